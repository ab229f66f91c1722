"""Bridge: how torch code becomes programs of the chip. All else of the platform is the same for every bridge.

The models, the sampler and the operations are torch code, and what the core touches outside of compiled steps are
tensors of the host. A bridge brings weights and caches to the chip, traces a step over them, compiles it, and runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

Spec = tuple[str | None, ...]
"""Axis of the mesh that splits each dimension of a tensor; the empty one, or None, leaves it whole on every chip."""

Kernel = Callable[..., tuple[Any, ...]]
"""A function of JAX arrays. It takes arrays of states first, then of tensors, and returns them in the same order: new
contents of the states, then results."""

Step = Callable[[Tensor], Sequence[Tensor]]
"""A program's body: a traced int32 tensor ``[W]`` of packed inputs in, traced results out."""


class State:
    """A buffer of the chip that programs change, such as a layer's KV cache. Every program that does is given it to
    keep: the contents before are gone.

    Attributes:
        tensor: the bridge's own kind, with the contents. A program's body reads and assigns it while it is traced.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ChipMemory:
    """Bytes of the memory of one chip.

    Attributes:
        total: that programs may use.
        held: taken by this process.
    """

    total: int
    held: int


class Executable(Protocol):
    """A compiled program.

    Attributes:
        temp_bytes: of memory that it takes while it runs; None where the compiler does not say.
        alias_bytes: of states that it changes in place.
    """

    @property
    def temp_bytes(self) -> int | None: ...

    @property
    def alias_bytes(self) -> int: ...


class Bridge(Protocol):
    """One way from torch to the chip. Opened once per process; nothing is done to torch or JAX before that.

    Attributes:
        name: as ``--tpu-bridge`` takes it.
        device_kind: JAX's name of the kind of device, such as ``"TPU v5 lite"``, or ``"cpu"`` where programs execute on
            the host.
        num_devices: that programs are spread over.
        versions: of all that a compiled program depends on.
    """

    name: str
    device_kind: str
    num_devices: int
    versions: tuple[str, ...]

    def adopt(self, host: Tensor, spec: Spec = ()) -> Tensor:
        """A tensor of the bridge's own kind with the contents of one of the host, for programs to read. They find it
        by themselves where a step uses it.
        """
        ...

    def spec_of(self, tensor: Any) -> Spec:
        """How an adopted tensor is split; the empty one for anything else."""
        ...

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, spec: Spec = ()) -> State:
        """A state full of zeros. It is freed with the last reference.

        Raises:
            ConfigError: the memory does not suffice.
        """
        ...

    def apply(self, function: Kernel, *tensors: Tensor, states: Sequence[State] = (), **static: Any) -> list[Tensor]:
        """Call a function of JAX on tensors.

        While a step is traced it becomes part of the program. Otherwise tensors are the host's: they go to the chip and
        results come back, while states change in place.

        Args:
            function: module-level, so that what is compiled for it is found again.
            tensors: all of this bridge while tracing (adopted ones at any time), else of the host.
            states: that the function changes.
            static: hashable named arguments of the function.
        """
        ...

    def trace(self, step: Step, words: int) -> Any:
        """Make a program of a step: one thread at a time.

        Adopted tensors that it uses become inputs, and states that it uses inputs that it changes in place. So do
        tensors of the host, with the contents that they have now.

        Args:
            words: size of the packed input.
        """
        ...

    def compile(self, traced: Any) -> Executable:
        """Compile what was traced; none of the step's own code runs any more. Any thread may, many at a time."""
        ...

    def call(self, executable: Any, packed_W: Tensor) -> Any:
        """Start a program.

        Args:
            packed_W: int32 of the host. It is not written to before the results were read.

        Returns:
            Its results, on the chip.
        """
        ...

    def to_host(self, results: Any) -> list[Tensor]:
        """Wait for results and fetch them: tensors of the host."""
        ...

    def memory(self) -> ChipMemory | None:
        """Of each chip; None where programs execute on the host."""
        ...

    def enable_cache(self, folder: Path) -> None:
        """Keep what is compiled from now on in a folder, and look there before."""
        ...
