"""Compiling steps for chips that are not there, by their own compiler.

Everything but the chip is real: the model's class, its number format, attention, sampling, and how all of it lies on a
mesh. Weights have shapes and no contents. What comes out cannot run here; it says how much memory it takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import torch
from jax import Array
from jax.sharding import NamedSharding
from torch import Tensor

from dovetail.errors import ConfigError
from dovetail_tpu.bridges.jax_bridge import JaxBridge
from dovetail_tpu.bridges.lifting import Lifted
from dovetail_tpu.bridges.protocol import ChipMemory, Step
from dovetail_tpu.bridges.transfers import jax_dtype
from dovetail_tpu.faults import compiling
from dovetail_tpu.slices import Slice
from dovetail_tpu.topology import topology_devices

CACHE_DIMS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of one device's memory that a program takes, as its compiler counts them.

    Attributes:
        arguments: weights, caches and inputs.
        alias: of them, what it changes in place: caches, and tables of the sampler.
        temp: besides, while it runs.
        code: of the program itself.
    """

    arguments: int
    alias: int
    temp: int
    code: int

    @property
    def total(self) -> int:
        """At a time."""
        return self.arguments + self.temp + self.code


@dataclass(frozen=True, slots=True)
class AotProgram:
    """A program that was compiled for another machine.

    Attributes:
        memory: of each device.
        text: in the compiler's own language, after all of its passes.
        caches: shapes on one device of the KV caches that it changes.
    """

    memory: Memory
    text: str
    caches: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Uncompiled:
    """Stands for a program that is compiled when somebody asks."""

    temp_bytes: int | None = None
    alias_bytes: int = 0


class AotBridge(JaxBridge):
    """The JAX bridge to a slice that is not there. It traces what a platform wants to be compiled, and compiles what
    somebody asks for.

    Args:
        target: the slice.
        devices: of it that the mesh has; all if not given.

    Attributes:
        traced: what was, in order.

    Raises:
        ConfigError: libtpu is not installed, or the slice has fewer devices.
    """

    name = "aot"

    def __init__(self, target: Slice, devices: int | None = None) -> None:
        devices = target.devices if devices is None else devices
        if not 1 <= devices <= target.devices:
            raise ConfigError(f"{target.name} has {target.devices} devices; a mesh of {devices} does not fit on it.")
        super().__init__(topology_devices(target)[:devices])
        self.traced: list[Lifted] = []
        self._chip = target.chip

    def memory(self) -> ChipMemory:
        """Of a device that holds nothing yet."""
        return ChipMemory(total=self._chip.hbm_bytes, held=0)

    def trace(self, step: Step, words: int) -> Lifted:
        """And remember that it came next."""
        self.traced.append(super().trace(step, words))
        return self.traced[-1]

    def compile(self, traced: Lifted) -> Uncompiled:  # type: ignore[override]  # nothing runs here
        """Not before somebody asks."""
        return Uncompiled()

    def call(self, executable: Any, packed_W: Tensor) -> list[Array]:
        """Nothing: only what has no results, but changes tables, is called while a model warms up."""
        return []

    def enable_cache(self, folder: Path) -> None:
        """None: without its chip, a program cannot be read back."""

    def program(self, traced: Lifted) -> AotProgram:
        """Compile it, by libtpu.

        Raises:
            ConfigError: it does not fit, or cannot be compiled; says what to change.
        """
        with compiling(self.device_kind, "A step"):  # all that is ours has run in the trace
            compiled = self.lowered(traced).compile()
        counted = compiled.memory_analysis()
        memory = Memory(
            arguments=counted.argument_size_in_bytes,
            alias=counted.alias_size_in_bytes,
            temp=counted.temp_size_in_bytes,
            code=counted.generated_code_size_in_bytes,
        )
        return AotProgram(memory, compiled.as_text(), caches_of(traced))

    def held(self) -> int:
        """Bytes on each device of all that was adopted or allocated, and not dropped since."""
        return sum(math.prod(_on_one_device(tensor)) * tensor.dtype.itemsize for tensor in self._tensors.values())

    def _place(self, host: Tensor, sharding: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(tuple(host.shape), jax_dtype(host.dtype), sharding=sharding)

    def _zeros(self, shape: Sequence[int], dtype: torch.dtype, sharding: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(tuple(shape), jax_dtype(dtype), sharding=sharding)

    def _abstract(self, constant: Array) -> Any:
        return jax.ShapeDtypeStruct(constant.shape, constant.dtype, sharding=self._sharding(()))

    def _lower(self, jitted: Any, *arguments: Any) -> Any:
        return jitted.trace(*arguments).lower(lowering_platforms=("tpu",))

    def _on_mesh(self) -> AbstractContextManager[Any]:
        """Always, so that kernels see the chip."""
        mesh: AbstractContextManager[Any] = jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)
        return mesh


def caches_of(traced: Lifted) -> tuple[tuple[int, ...], ...]:
    """Shapes on one device of the KV caches among what a program changes; tables of the sampler have two dimensions."""
    return tuple(_on_one_device(tensor) for tensor in traced.changes if tensor.ndim == CACHE_DIMS)


def _on_one_device(tensor: Any) -> tuple[int, ...]:
    array = tensor._elem
    shape: tuple[int, ...] = array.sharding.shard_shape(array.shape)
    return shape
