"""Calling kernels by the names of their arrays, on the chip of the bridge that is open."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jax import Array
from torch import Tensor

from dovetail_tpu import bridges
from dovetail_tpu.kernels.chip import Chip, chip_of_kind
from dovetail_tpu.mesh import whole

Kernel = Callable[..., tuple[Array, ...]]
"""Called as ``kernel(**arrays, chip=..., **static)``; an array that is not given is None. ``chip`` is None where
programs execute on the host: kernels are interpreted there."""


def chip() -> Chip | None:
    """That the open bridge compiles for; None for the host."""
    return chip_of_kind(bridges.current().device_kind)


def call(kernel: Kernel, tensors: Mapping[str, Tensor | None], **static: Any) -> list[Tensor]:
    """Run a kernel; on several devices, on each with whole arrays.

    Args:
        kernel: module-level, so that what is compiled for it is found again.
        tensors: of the program that is traced, or of the host.
        static: hashable.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    absent = tuple(name for name, tensor in tensors.items() if tensor is None)
    names = tuple(given)
    return bridges.current().apply(
        _by_name, *given.values(), kernel=kernel, names=names, absent=absent, chip=chip(), static=(*static.items(),)
    )


def _by_name(
    *arrays: Array,
    kernel: Kernel,
    names: tuple[str, ...],
    absent: tuple[str, ...],
    chip: Chip | None,
    static: tuple[tuple[str, Any], ...],
) -> tuple[Array, ...]:
    def run(*arrays: Array) -> tuple[Array, ...]:
        named = dict(zip(names, arrays, strict=True))
        return kernel(**named, **dict.fromkeys(absent), chip=chip, **dict(static))

    results: tuple[Array, ...] = whole(run)(*arrays)
    return results
