"""Norms for the op table: the kernel where it reads rows once that XLA would read twice, else the reference."""

from __future__ import annotations

import torch
from jax import Array
from torch import Tensor

from dovetail.ops import reference
from dovetail_tpu.calls import call, chip
from dovetail_tpu.kernels import rms_norm as kernel
from dovetail_tpu.kernels.chip import V5E, Chip


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See the reference."""
    if not _reads_once(x_TD):
        return reference.rms_norm(x_TD, weight_D, eps)
    (norm_TD,) = call(_norm, {"x": x_TD, "weight": weight_D, "residual": None}, eps=eps)
    return norm_TD


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See the reference."""
    if not _reads_once(x_TD):
        return reference.add_rms_norm(x_TD, residual_TD, weight_D, eps)
    norm_TD, sum_TD = call(_norm, {"x": x_TD, "weight": weight_D, "residual": residual_TD}, eps=eps)
    return norm_TD, sum_TD


def add_rms_norm_quantize(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype, group_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See the reference."""
    if not _reads_once(x_TD, group_size):
        return reference.add_rms_norm_quantize(x_TD, residual_TD, weight_D, eps, dtype, group_size)
    tensors = {"x": x_TD, "weight": weight_D, "residual": residual_TD}
    name = str(dtype).removeprefix("torch.")
    norm_TD, scale_TG, sum_TD = call(_norm, tensors, eps=eps, dtype=name, group=group_size)
    return norm_TD, scale_TG, sum_TD


def _reads_once(x_TD: Tensor, group: int | None = None) -> bool:
    return x_TD.ndim == 2 and kernel.reads_once(chip(), len(x_TD), x_TD.shape[1], x_TD.dtype.itemsize, group)


def _norm(
    x: Array,
    weight: Array,
    residual: Array | None,
    *,
    eps: float,
    chip: Chip | None,
    dtype: str | None = None,
    group: int | None = None,
) -> tuple[Array, ...]:
    out = kernel.rms_norm(
        x, weight, residual, eps=eps, dtype=dtype, group=group, chip=chip or V5E, interpret=chip is None
    )
    return tuple(array for array in out if array is not None)
