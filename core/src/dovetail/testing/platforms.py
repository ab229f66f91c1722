"""Platforms for tests: the reference operations on the host, with exact or padded shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dovetail.contracts.platform import (
    Bucket,
    ExactShapes,
    LadderShapes,
    MemoryInfo,
    Platform,
    PlatformConfig,
    Probe,
    ShapePolicy,
    StepFunction,
)
from dovetail.tensors import leaves, replaced

GIB = 1 << 30


class ReferencePlatform(Platform):
    """Overrides nothing: every operation is the reference implementation. Use with ``--attention reference``."""

    @classmethod
    def probe(cls) -> Probe:
        """Always available."""
        return Probe(available=True)

    def __init__(self, config: PlatformConfig) -> None:
        """Nothing to initialise."""

    @property
    def device(self) -> torch.device:
        """The host."""
        return torch.device("cpu")

    def memory(self) -> MemoryInfo:
        """A fixed size, so that tests see the same cache everywhere."""
        return MemoryInfo(total=4 * GIB, available=4 * GIB)

    @classmethod
    def default_dtype(cls, checkpoint_dtype: torch.dtype) -> torch.dtype:
        """Always float32."""
        return torch.float32

    def ops(self, dtype: torch.dtype) -> Mapping[str, Callable[..., Any]]:
        """No overrides."""
        return {}

    def shape_policy(self, max_tokens: int, max_requests: int) -> ShapePolicy:
        """Exact shapes."""
        return ExactShapes(list(dict.fromkeys([Bucket(max_tokens, max_requests), Bucket(1, 1)])))

    def compile(self, step: StepFunction, bucket: Bucket) -> StepFunction:
        """Unchanged."""
        return step


class LadderPlatform(ReferencePlatform):
    """Pads every step to a ladder of sizes, as chips with graphs or ahead-of-time compilers need, and checks it.

    Attributes:
        compiled: every step and bucket that was compiled, in order; a draft model has a step of its own.
    """

    def __init__(self, config: PlatformConfig) -> None:
        super().__init__(config)
        self.compiled: list[tuple[StepFunction, Bucket]] = []
        self._shapes: dict[tuple[StepFunction, Bucket], Any] = {}

    def shape_policy(self, max_tokens: int, max_requests: int) -> ShapePolicy:
        """Powers of two, up to the largest step."""
        return LadderShapes(tokens=_powers(max_tokens), requests=_powers(max_requests))

    def compile(self, step: StepFunction, bucket: Bucket) -> StepFunction:
        """Wrap the step so that a wrong shape fails the test; a step's bucket is compiled once."""
        key = (step, bucket)
        assert key not in self.compiled, f"{bucket} compiled twice"
        self.compiled.append(key)
        shapes = self._shapes

        def checked(tensors: Any, metadata: Any) -> Any:
            assert len(tensors.token_ids_T) == bucket.num_tokens, (len(tensors.token_ids_T), bucket)
            assert len(tensors.seq_lens_R) == bucket.num_requests, (len(tensors.seq_lens_R), bucket)
            shape = (tensors.logits_rows_S.shape, *(table.shape for table in tensors.block_tables))
            assert shapes.setdefault(key, shape) == shape, (shapes[key], shape)
            return step(tensors, metadata)

        return checked


class WholeShapes(LadderShapes):
    """A ladder of steps that sample."""

    whole = True


class WholePlatform(LadderPlatform):
    """Compiles sampling with the model, as chips need whose programs take long to compile and to reach.

    What such a chip could not do fails the test: to run a step of other shapes than those of warm-up, or to reach what
    it adopted outside of compiled steps.

    Attributes:
        num_runs: of compiled steps.
        num_downloads: how often the host waited for results.
    """

    def __init__(self, config: PlatformConfig) -> None:
        super().__init__(config)
        self.num_runs = self.num_downloads = 0
        self._is_warm = False

    def shape_policy(self, max_tokens: int, max_requests: int) -> ShapePolicy:
        """Powers of two, up to the largest step."""
        return WholeShapes(tokens=_powers(max_tokens), requests=_powers(max_requests))

    def adopt(self, value: Any) -> Any:
        """Keep it from others."""
        if isinstance(value, torch.nn.Module):
            for name in ("forward", "logits"):
                setattr(value, name, _Adopted.only_inside(getattr(value, name)))
            return value
        kept: dict[int, torch.Tensor] = {}
        return replaced(value, lambda tensor: kept.setdefault(id(tensor), tensor.clone().as_subclass(_Adopted)))

    def compile(self, step: StepFunction, bucket: Bucket) -> StepFunction:
        """Wrap the step so that a wrong shape fails the test; a step's bucket is compiled once."""
        key = (step, bucket)
        assert key not in self.compiled, f"{bucket} compiled twice"
        self.compiled.append(key)

        def checked(*args: Any) -> Any:
            own = (args[0], args[2:])  # metadata is the backend's
            shapes = [(leaf.shape, leaf.dtype) for leaf in leaves(own) if isinstance(leaf, torch.Tensor)]
            is_known = self._shapes.setdefault(key, shapes) == shapes
            assert is_known, f"{bucket}: {self._shapes[key]} became {shapes}"
            self.num_runs += 1
            with _Adopted.open():
                return step(*args)

        scores_prompts = getattr(step, "__name__", "") == "_scored"
        assert scores_prompts or not self._is_warm, f"{step} was not warmed up for {bucket}"
        return checked

    def download(self, tensors: Sequence[torch.Tensor]) -> Callable[[], Sequence[torch.Tensor]]:
        """Count it."""
        self.num_downloads += 1
        return super().download(tensors)

    def warmed_up(self) -> None:
        """From now on nothing is compiled."""
        self._is_warm = True


class _Adopted(torch.Tensor):
    """A tensor in memory that only compiled steps reach."""

    _inside = 0

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[None]:
        """A compiled step runs."""
        cls._inside += 1
        try:
            yield
        finally:
            cls._inside -= 1

    @classmethod
    def only_inside(cls, run: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, for compiled steps alone."""

        def checked(*args: Any) -> Any:
            assert cls._inside, f"{run} outside of compiled steps"
            return run(*args)

        return checked

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert cls._inside, f"{func} outside of compiled steps"
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _powers(size: int) -> list[int]:
    powers = [1]
    while powers[-1] < size:
        powers.append(min(2 * powers[-1], size))
    return powers
