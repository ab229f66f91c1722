"""JaxBridge: torch code becomes JAX programs by torchax, with whatever release of torch is current."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import jax
import jax.numpy as jnp
import torch
from jax import Array
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dovetail.errors import ConfigError
from dovetail_tpu.bridges.host_maps import room
from dovetail_tpu.bridges.lifting import Lifted, lift, shape_of
from dovetail_tpu.bridges.protocol import ChipMemory, Kernel, Spec, State, Step
from dovetail_tpu.bridges.torchax_ops import TracingEnvironment, wrapped
from dovetail_tpu.bridges.transfers import array_of, jax_dtype, numpy_of, tensor_of
from dovetail_tpu.faults import compiling, explained, program_of
from dovetail_tpu.mesh import tp_mesh

FEW, MANY = 64, 4096
"""Programs of calls outside of steps that a process keeps: few where they execute on the host, for the reason that
:mod:`~dovetail_tpu.bridges.host_maps` gives; on a chip many, because eager steps need dozens for each size of theirs.
"""


@dataclass(frozen=True, slots=True)
class JaxExecutable:
    """A compiled program, and the tensors whose arrays it takes."""

    compiled: Any
    lifted: Lifted
    temp_bytes: int | None
    alias_bytes: int


class JaxBridge:
    """See :class:`~dovetail_tpu.bridges.protocol.Bridge`."""

    name = "jax"

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        """Over a mesh of these devices."""
        jax.config.update("jax_enable_x64", True)  # int64 is part of the noise that samples
        self.mesh = tp_mesh(devices)
        self._env = TracingEnvironment()
        self._tensors: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        self._specs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._count = 0
        self._is_tracing = False
        self._first = devices[0]
        self._compiled = _few if self._is_host else _many
        self.device_kind = self._first.device_kind
        self.num_devices = len(devices)
        client = self._first.client.platform_version.splitlines()
        self.versions = (jax.__version__, version("jaxlib"), version("torchax"), torch.__version__, *client)

    @classmethod
    def open(cls, devices: int | None = None) -> JaxBridge:
        """Initialise the chips.

        Args:
            devices: how many; all if not given.

        Raises:
            ConfigError: there are not so many.
        """
        there = jax.devices()
        if devices is not None and not 1 <= devices <= len(there):
            raise ConfigError(f"A mesh of {devices} devices does not fit on this machine, which has {len(there)}.")
        return cls(there[:devices])

    def adopt(self, host: Tensor, spec: Spec = ()) -> Tensor:
        """An array on the chips, wrapped."""
        tensor = self._known(self._place(host, self._sharding(spec)))
        self._specs[tensor] = spec
        return tensor

    def spec_of(self, tensor: Any) -> Spec:
        """As it was adopted."""
        spec: Spec = self._specs[tensor] if isinstance(tensor, Tensor) and tensor in self._specs else ()
        return spec

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, spec: Spec = ()) -> State:
        """An array of zeros, wrapped."""
        with explained(self.device_kind, "The KV cache"):
            return State(self._known(self._zeros(shape, dtype, self._sharding(spec))))

    def apply(self, function: Kernel, *tensors: Tensor, states: Sequence[State] = (), **static: Any) -> list[Tensor]:
        """Call it inline while tracing, else compiled: on the mesh if it changes what lies there."""
        contents = [state.tensor._elem for state in states]  # type: ignore[attr-defined]
        arrays = self._env.t2j_iso(tensors)
        if contents and not self._is_tracing:
            arrays = jax.device_put(arrays, self._sharding(()))
        with self._on_mesh() if contents or self._is_tracing else nullcontext():
            inputs = [*contents, *arrays]
            outputs = function(*inputs, **static) if self._is_tracing else self._run(function, inputs, states, static)
        for state, array in zip(states, outputs, strict=False):
            state.tensor._elem = array  # type: ignore[attr-defined]
        results = outputs[len(states) :]
        if self._is_tracing:
            return [wrapped(array, self._env) for array in results]
        self._env.constants.clear()
        return [tensor_of(array) for array in results]

    def trace(self, step: Step, words: int) -> Lifted:
        """By putting tracers into all wrappers that are alive."""
        self._is_tracing = True
        try:
            with self._on_mesh(), jax.default_matmul_precision("highest"):
                return lift(step, words, [self._tensors[key] for key in sorted(self._tensors)], self._env)
        finally:
            self._is_tracing = False

    def compile(self, traced: Lifted) -> JaxExecutable:
        """By XLA. What comes out takes the shapes that were traced, and raises for others.

        Raises:
            ConfigError: there is no room for it on the host.
        """
        with room() if self._is_host else nullcontext():
            compiled = self.lowered(traced).compile()
        memory = compiled.memory_analysis()
        temp = None if self._is_host else memory.temp_size_in_bytes
        return JaxExecutable(compiled, traced, temp, memory.alias_size_in_bytes)

    def lowered(self, traced: Lifted) -> Any:
        """In the compiler's input language. States stay where they are."""
        reads, changes = traced.shapes
        packed = jax.ShapeDtypeStruct((traced.words,), jnp.int32, sharding=self._sharding(()))
        homes = None if self.num_devices == 1 else ([array.sharding for array in changes], None)
        jitted = jax.jit(traced.function, donate_argnums=2, out_shardings=homes)
        with self._on_mesh():
            return self._lower(jitted, [self._abstract(array) for array in traced.constants], reads, changes, packed)

    def call(self, executable: JaxExecutable, packed_W: Tensor) -> list[Array]:
        """Start it, and the copies of its results."""
        lifted = executable.lifted
        reads, changes = lifted.arrays()
        changed, results = executable.compiled(lifted.constants, reads, changes, numpy_of(packed_W))
        for tensor, array in zip(lifted.changes, changed, strict=True):
            tensor._elem = array  # type: ignore[attr-defined]
        for array in results:
            array.copy_to_host_async()
        return list(results)

    def to_host(self, results: Sequence[Array]) -> list[Tensor]:
        """Wait for the copies."""
        return [tensor_of(array) for array in results]

    def memory(self) -> ChipMemory | None:
        """As the runtime of the chip counts it."""
        stats = self._first.memory_stats()
        if stats is None:
            return None
        return ChipMemory(total=stats["bytes_limit"], held=stats["bytes_in_use"])

    def enable_cache(self, folder: Path) -> None:
        """JAX's own, with everything in it."""
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        # XLA's own caches would lie in the folder too, and its path would become part of every program's key
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
        compilation_cache.reset_cache()  # it may have been opened elsewhere

    @property
    def _is_host(self) -> bool:
        """Whether programs execute there."""
        return bool(self._first.platform == "cpu")

    def _run(
        self, function: Kernel, inputs: Sequence[Array], states: Sequence[State], static: dict[str, Any]
    ) -> Sequence[Array]:
        shapes = (*map(shape_of, inputs),)
        compiled = self._compiled(function, len(states), (*static.items(),), shapes, self.device_kind)
        outputs: Sequence[Array] = compiled(*inputs)
        return outputs

    def _place(self, host: Tensor, sharding: NamedSharding) -> Any:
        return array_of(host, sharding)

    def _zeros(self, shape: Sequence[int], dtype: torch.dtype, sharding: NamedSharding) -> Any:
        return jnp.zeros(tuple(shape), jax_dtype(dtype), device=sharding).block_until_ready()  # it may fail only then

    def _abstract(self, constant: Array) -> Any:
        return constant

    def _lower(self, jitted: Any, *arguments: Any) -> Any:
        return jitted.lower(*arguments)

    def _sharding(self, spec: Spec) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def _on_mesh(self) -> AbstractContextManager[Any]:
        """Where kernels find out that there are several devices."""
        if self.num_devices == 1:
            return nullcontext()
        mesh: AbstractContextManager[Any] = jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)
        return mesh

    def _known(self, array: Array) -> Tensor:
        """A wrapper that programs find."""
        with torch.inference_mode(False):  # steps may change it
            tensor = wrapped(array, self._env)
        self._tensors[self._count] = tensor
        self._count += 1
        return tensor


def _compiled(
    function: Kernel,
    num_states: int,
    static: tuple[tuple[str, Any], ...],
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    device_kind: str,
) -> Any:
    named = dict(static)
    traced = jax.jit(functools.partial(function, **named), donate_argnums=tuple(range(num_states))).trace(*shapes)
    with compiling(device_kind, program_of(function, named)):
        return traced.lower().compile()


_few, _many = (functools.lru_cache(most)(_compiled) for most in (FEW, MANY))
