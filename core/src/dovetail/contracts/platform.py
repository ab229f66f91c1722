"""Platform: everything that is specific to a chip. Nothing else asks which chip runs; code asks for a capability."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """The answer to "can this machine run it?".

    Attributes:
        available: whether the platform can be used here and now.
        reason: why not, with what to do; empty when available.
        facts: what an operator wants to see: chip, cores, memory, instruction sets, driver versions.
    """

    available: bool
    reason: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryInfo:
    """Bytes on the device, before the KV cache is allocated.

    Attributes:
        total: of the device.
        available: not taken by others, nor by the weights.
        dedicated: memory of the device's own, which no other program needs: the KV cache may take most of it.
        held: taken by this process: weights, and what its runtime needs.
        peak: most that this process held at a time since the call before, with whatever the platform will take for
            later steps as large as those so far. None if it is not counted; else the engine runs its largest step
            before it gives the rest to the KV cache.
    """

    total: int
    available: int
    dedicated: bool = False
    held: int = 0
    peak: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PlatformConfig:
    """What the operator decides about a platform.

    Attributes:
        num_threads: host threads for computation; None lets the platform choose.
        eager: run each operation as it comes: ``compile`` must return the step unchanged, or what is as good as that
            for finding a fault. Platforms that never do anything else need not look.
        cache: folder for what the platform compiles, kept for the next start; None keeps nothing. Others write there
            too: use a folder inside, named by the chip and the versions that its contents depend on.
        workload: the same text for engines that run the same steps: same model, number formats and limits.
        options: the platform's own section: the manifest's ``defaults``, overlaid with ``--platform-config``.
    """

    num_threads: int | None = None
    eager: bool = False
    cache: Path | None = None
    workload: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


class Bucket(NamedTuple):
    """A step size: tensors are padded up to it."""

    num_tokens: int
    num_requests: int


class ShapePolicy(ABC):
    """Which step sizes exist. The runner pads every step to ``fit`` and warms up ``ladder``.

    Attributes:
        static: every step of a bucket has the same tensor shapes: block tables have all their columns, and there are
            ``num_requests × (1 + drafts)`` rows of logits, or ``num_tokens`` if that is less. Otherwise both are as
            small as the step allows.
        whole: sampling is part of the steps that are compiled, whose shapes are static then: see
            :meth:`Platform.compile`. Every step does all that sampling may have to do.
    """

    static: bool
    whole: bool = False

    @abstractmethod
    def fit(self, num_tokens: int, num_requests: int) -> Bucket:
        """The smallest bucket that holds a step of this size."""
        ...

    @abstractmethod
    def ladder(self) -> Sequence[Bucket]:
        """The buckets to compile before serving, largest first."""
        ...


class ExactShapes(ShapePolicy):
    """No padding: every step runs at its own size. Warm-up runs the given sizes."""

    static = False

    def __init__(self, warm_up: Sequence[Bucket]) -> None:
        self._warm_up = tuple(warm_up)

    def fit(self, num_tokens: int, num_requests: int) -> Bucket:
        """The size itself."""
        return Bucket(num_tokens, num_requests)

    def ladder(self) -> Sequence[Bucket]:
        """The warm-up sizes."""
        return self._warm_up


class LadderShapes(ShapePolicy):
    """A fixed set of sizes, for graphs and ahead-of-time compilers."""

    static = True

    def __init__(self, tokens: Sequence[int], requests: Sequence[int]) -> None:
        self._tokens = tuple(sorted(set(tokens)))
        self._requests = tuple(sorted(set(requests)))

    def fit(self, num_tokens: int, num_requests: int) -> Bucket:
        """The next rung in each direction.

        Raises:
            ValueError: the step exceeds the largest rung.
        """
        requests = _next_rung(self._requests, num_requests)
        return Bucket(_next_rung(self._tokens, max(num_tokens, requests)), requests)

    def ladder(self) -> Sequence[Bucket]:
        """Every pair in which no request is empty."""
        pairs = [Bucket(t, r) for t in self._tokens for r in self._requests if t >= r]
        return sorted(pairs, reverse=True)


def _next_rung(rungs: Sequence[int], size: int) -> int:
    for rung in rungs:
        if rung >= size:
            return rung
    raise ValueError(f"{size} exceeds the largest rung of the ladder, {rungs[-1]}.")


StepFunction = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""Runs the model over one step: ``(StepTensors, metadata per KV group)`` in, hidden states ``[T, D]``, or ``[S, D]`` if
the others are not read, and logits ``[S, V]`` out. Others with :attr:`ShapePolicy.whole`: see
:meth:`Platform.compile`."""


class Platform(ABC):
    """A chip. Constructed after ``probe`` said yes: to run, and by the resolver to ask for the default dtype."""

    @classmethod
    @abstractmethod
    def probe(cls) -> Probe:
        """Whether this machine can run the platform. Must not raise and must not initialise the device.

        Phase: resolve. Order: 1. Times: per candidate. May raise: nothing.
        """
        ...

    @abstractmethod
    def __init__(self, config: PlatformConfig) -> None:
        """Initialise the device.

        Phase: load. Order: 1. Times: once. May raise: ConfigError.

        Raises:
            ConfigError: a value of ``config`` cannot be honoured.
        """
        ...

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where all tensors live that code outside of compiled steps touches.

        Those are step tensors, what steps give, and weights as they are read. What only compiled steps read may live
        elsewhere: see :meth:`adopt`.

        Phase: load. Order: 3. Times: often. May raise: nothing.
        """
        ...

    @abstractmethod
    def memory(self) -> MemoryInfo:
        """Device memory now.

        Phase: load. Order: 6. Times: before and after the weights, and after the largest step if it counts peaks. May
        raise: nothing.
        """
        ...

    @classmethod
    @abstractmethod
    def default_dtype(cls, checkpoint_dtype: torch.dtype) -> torch.dtype:
        """The activation dtype for ``--dtype auto``, among the manifest's. Must not initialise the device.

        Phase: resolve. Order: 2. Times: once, with --dtype auto. May raise: ConfigError.
        """
        ...

    @abstractmethod
    def ops(self, dtype: torch.dtype) -> Mapping[str, Callable[..., Any]]:
        """The operations that the platform overrides for this activation dtype (see :class:`OpTable`).

        Phase: load. Order: 2. Times: once. May raise: ConfigError.
        """
        ...

    @abstractmethod
    def shape_policy(self, max_tokens: int, max_requests: int) -> ShapePolicy:
        """Which step sizes exist, given the largest step.

        Phase: load. Order: 5. Times: once. May raise: ConfigError.
        """
        ...

    def prepare(self, run: Callable[[], object]) -> None:  # noqa: B027  most have nothing to do
        """``run`` will be called soon, for its results. A platform that compiles what it launches may call it now, to
        find out what that is and compile all of it together; what is computed meanwhile nobody reads.

        Phase: load. Order: 4. Times: before each self-check, and before the largest step. May raise: nothing.
        """

    def staging(self, nbytes: int) -> Tensor:
        """Host memory to read files into, on its way to the device: uint8 ``[nbytes]``.

        A platform whose device copies on its own, which takes memory that stays in place, gives pinned memory: the
        engine then reads the next piece while one is copied.

        Phase: load. Order: 7. Times: often, where weights are read from files. May raise: nothing.
        """
        return torch.empty(nbytes, dtype=torch.uint8)

    def adopt(self, value: T) -> T:
        """Bring what compiled steps read, or change, into memory that suits them, where that is not ``device``.

        Given are a model whose weights are there, which may be changed in place, and containers of tables that steps
        write to. From now on no code but compiled steps reads or writes tensors in it, if steps are ``whole``; else the
        logits of prompts to be scored are taken from the model outside of them. A tensor that is found twice stays one.
        See :mod:`dovetail.tensors`.

        Phase: load. Order: 8. Times: per model, and per container of tables. May raise: ConfigError.

        Returns:
            The value, or one like it around other tensors.

        Raises:
            ConfigError: it does not fit.
        """
        return value

    def upload(self, host: Tensor) -> Tensor:
        """A host tensor on the device, for work that is queued from now on. Neither is changed afterwards.

        A platform whose device works on its own need not wait until a copy is there.

        Phase: warm-up. Order: 2. Times: often, and in every step. May raise: nothing.
        """
        return host.to(self.device)

    def download(self, tensors: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
        """Copy device tensors to the host, as they are after the work queued so far.

        A platform whose device works on its own starts the copies, and returns without waiting. The tensors are not
        written again.

        Phase: warm-up. Order: 3. Times: often, and in every step. May raise: nothing.

        Returns:
            What waits for the copies and gives them; called at most once, perhaps after later steps were queued.
        """
        copies = [tensor.cpu() for tensor in tensors]
        return lambda: copies

    @abstractmethod
    def compile(self, step: StepFunction, bucket: Bucket) -> StepFunction:
        """Turn the step into whatever runs fastest at this size. May return it unchanged.

        Called once per bucket and step: a draft model has a step of its own, and so have prompts whose
        log-probabilities are wanted, which is compiled when the first of them comes.

        What a compiled step returns need only last until a compiled step runs again, of any bucket.

        With :attr:`ShapePolicy.whole` a step takes a third argument, what is sampled
        (:class:`dovetail.runner.sample_inputs.SampleInputs`), and returns the outcome. There is a step for what most
        requests want, and one for all that they may want; both are warmed up. One more function is compiled, for the
        smallest bucket: it writes to the adopted tables that these steps read. Arguments and results are tensors in
        containers that :mod:`dovetail.tensors` walks, and None; take them as they come. With a draft model there are
        steps of two arguments as well.

        Phase: warm-up. Order: 1. Times: per bucket, and later for sizes not in the ladder. May raise: nothing.
        """
        ...

    def await_compiled(self, told: Callable[[int, int], None]) -> None:  # noqa: B027  most compile as they go
        """Everything that warm-up runs has been met. A platform that compiles it in the background waits here.

        Phase: warm-up. Order: 4. Times: once. May raise: ConfigError.

        Args:
            told: how many parts are compiled, and of how many, whenever one is done.

        Raises:
            ConfigError: something does not fit.
        """

    def warmed_up(self) -> None:  # noqa: B027  most have nothing to do
        """Every bucket of the ladder has run, of a draft model's step, too, and what samples has.

        Phase: warm-up. Order: 5. Times: once. May raise: nothing.
        """

    def close(self) -> None:  # noqa: B027  most have nothing to do
        """The engine ends, or could not start: nobody waits any more for what was begun in the background, such as
        compilations. Drop what is queued, and end processes that work on it.

        Phase: end. Order: 1. Times: once or more, also where loading fails or is interrupted. May raise: nothing.
        """
