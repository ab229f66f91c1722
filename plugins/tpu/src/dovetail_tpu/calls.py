"""Calling kernels by the names of their arrays, on the chip of the bridge that is open."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from jax import Array
from torch import Tensor

from dovetail_tpu import bridges
from dovetail_tpu.kernels.chip import Chip, chip_of_kind
from dovetail_tpu.mesh import Split, over_product

Kernel = Callable[..., tuple[Array, ...]]
"""Called as ``kernel(**arrays, chip=..., **static)``; an array that is not given is None. ``chip`` is None where
programs execute on the host: kernels are interpreted there."""


def chip() -> Chip | None:
    """That the open bridge compiles for; None for the host."""
    return chip_of_kind(bridges.current().device_kind)


def call(
    kernel: Kernel,
    tensors: Mapping[str, Tensor | None],
    split: Split = Split.WHOLE,
    dims: Mapping[str, str] = MappingProxyType({}),
    **static: Any,
) -> list[Tensor]:
    """Run a kernel; on several devices, on each with its part of what is split.

    Args:
        kernel: module-level, so that what is compiled for it is found again.
        tensors: of the program that is traced, or of the host.
        split: along what the weight is split that it multiplies with.
        dims: of tensors that may be split, see :func:`dovetail_tpu.mesh.over_product`.
        static: hashable.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    absent = tuple(name for name, tensor in tensors.items() if tensor is None)
    return bridges.current().apply(
        _by_name,
        *given.values(),
        kernel=kernel,
        names=tuple(given),
        absent=absent,
        split=split,
        dims=tuple(dims.get(name, "") for name in given),
        chip=chip(),
        static=(*static.items(),),
    )


def _by_name(
    *arrays: Array,
    kernel: Kernel,
    names: tuple[str, ...],
    absent: tuple[str, ...],
    split: Split,
    dims: tuple[str, ...],
    chip: Chip | None,
    static: tuple[tuple[str, Any], ...],
) -> tuple[Array, ...]:
    def run(*arrays: Array) -> tuple[Array, ...]:
        named = dict(zip(names, arrays, strict=True))
        return kernel(**named, **dict.fromkeys(absent), chip=chip, **dict(static))

    return over_product(run, split, dims)(*arrays)
