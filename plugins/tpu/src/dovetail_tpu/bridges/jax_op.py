"""Functions of JAX as operations of torch_xla: lowered to HLO for the chip, which becomes part of torch_xla's programs.

JAX itself never opens the chip, which belongs to torch_xla: it lowers for a platform that is named. torch_xla's own
``call_jax`` needs torchax, and asks JAX which devices there are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import torch
import torch_xla.core.xla_builder as xb
from jax.sharding import AbstractDevice, AbstractMesh
from torch import Tensor

from dovetail_tpu.bridges.protocol import Kernel
from dovetail_tpu.bridges.transfers import jax_dtype
from dovetail_tpu.faults import compiling, program_of

Operation = Callable[[Sequence[Tensor]], list[Tensor]]
Operand = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype."""


def call(function: Kernel, operands: Sequence[Tensor], static: dict[str, Any], device_kind: str) -> list[Tensor]:
    """Apply a function of JAX to tensors of torch_xla. It is lowered once per function, static arguments and shapes."""
    shapes = tuple((tuple(operand.shape), operand.dtype) for operand in operands)
    return _operation(function, tuple(static.items()), shapes, device_kind)(operands)


@functools.cache
def _operation(
    function: Kernel, static: tuple[tuple[str, Any], ...], shapes: tuple[Operand, ...], device_kind: str
) -> Operation:
    arrays = [jax.ShapeDtypeStruct(shape, jax_dtype(dtype)) for shape, dtype in shapes]
    named = dict(static)
    platform = "cpu" if device_kind == "cpu" else "tpu"
    with jax.enable_x64(True), jax.default_matmul_precision("highest"), _chip(device_kind):  # torch's tables hold int64
        traced = jax.jit(functools.partial(function, **named), keep_unused=True).trace(*arrays)
        with compiling(device_kind, program_of(function, named)):
            hlo = traced.lower(lowering_platforms=(platform,)).compiler_ir("hlo")
    computation = xb.computation_from_module_proto(function.__name__, hlo.as_serialized_hlo_module_proto())
    operation: Operation = xb.xla_computation_as_func(computation, function.__name__)
    return operation


@contextmanager
def _chip(kind: str) -> Iterator[None]:
    """While a function is lowered for a chip: what kernels ask about it they are told."""
    if kind == "cpu":
        yield
        return
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        yield
