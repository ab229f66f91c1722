"""Products with weights in 8 and 4 bits for the op table: torch's tensors in and out, kernels in between.

Weights stay as they are; their scales are put in the order in which the kernel reads them. Groups that it does not take
run on the reference. Meanings: :mod:`dovetail.ops.reference`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jax import Array
from torch import Tensor

from dovetail.ops import reference
from dovetail.ops.reference import QuantizedExperts, ScaledWeight
from dovetail_tpu.calls import call
from dovetail_tpu.kernels import int4_matmul
from dovetail_tpu.kernels.chip import Chip
from dovetail_tpu.kernels.grouped_matmul import grouped_matmul
from dovetail_tpu.kernels.product_tiles import fits_lanes, groups_by_step
from dovetail_tpu.kernels.quantized_matmul import Weight, quantized_matmul


class Codes(NamedTuple):
    """A quantized weight, or those of all experts.

    Attributes:
        codes: ``[O, J]`` or ``[E, O, J]``.
        scale, zero: ``[S, G, O]`` or ``[E, S, G, O]``, float32; see
            :class:`dovetail_tpu.kernels.quantized_matmul.Weight`.
        group: inputs that share a scale.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    group: int


def weight_only_pack(weight_OI: Tensor, scale_OG: Tensor, group_size: int | None = None) -> Codes | ScaledWeight:
    """Put the scales in order."""
    group = group_size or weight_OI.shape[1]
    if not fits_lanes(weight_OI.shape[1], group):
        return reference.weight_only_pack(weight_OI, scale_OG, group_size)
    return Codes(weight_OI.contiguous(), _by_step(scale_OG, weight_OI.shape[1], group), None, group)


def weight_only_mm(x_TI: Tensor, packed: Codes | ScaledWeight, bias_O: Tensor | None = None) -> Tensor:
    """See the reference; the product is rounded before the bias is added."""
    if isinstance(packed, ScaledWeight):
        return reference.weight_only_mm(x_TI, packed, bias_O)
    out_TO = _product(x_TI, packed, None, x_TI.dtype)
    return out_TO if bias_O is None else out_TO + bias_O


def scaled_mm_pack(weight_OI: Tensor) -> Tensor:
    """The weight as it is."""
    return weight_OI.contiguous()


def scaled_mm(
    x_TI: Tensor, weight_OI: Tensor, x_scale_T1: Tensor, weight_scale_O1: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """See the reference."""
    outputs, inputs = weight_OI.shape
    scale = weight_scale_O1.expand(outputs, 1).reshape(1, 1, outputs)
    return _product(x_TI, Codes(weight_OI, scale, None, inputs), x_scale_T1.expand(len(x_TI), 1), out_dtype)


def block_scaled_pack(weight_OI: Tensor, scale_OG: Tensor, group_size: int) -> Codes | ScaledWeight:
    """Put the scales in order."""
    return weight_only_pack(weight_OI, scale_OG, group_size)


def block_scaled_mm(x_TI: Tensor, packed: Codes | ScaledWeight, x_scale_TG: Tensor, out_dtype: torch.dtype) -> Tensor:
    """See the reference."""
    if isinstance(packed, ScaledWeight):
        return reference.block_scaled_mm(x_TI, packed, x_scale_TG, out_dtype)
    return _product(x_TI, packed, x_scale_TG, out_dtype)


def w4a16_mm(x_TI: Tensor, weight_packed: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int) -> Tensor:
    """See the reference."""
    (out_TO,) = call(_pairs, {"x": x_TI, "codes": weight_packed, "scale": scales, "zero": zeros}, group=group_size)
    return out_TO


def quantized_experts_pack(
    weight_EOI: Tensor, scale_EOG: Tensor, zero_EOG: Tensor | None = None, group_size: int | None = None
) -> Codes | QuantizedExperts:
    """Put the scales in order."""
    plain = reference.quantized_experts_pack(weight_EOI, scale_EOG, zero_EOG, group_size)
    columns, group, parts = weight_EOI.shape[2], plain.group_size, 2 if weight_EOI.dtype == torch.uint8 else 1
    if group % parts or not fits_lanes(columns, group // parts):
        return plain
    scale, zero = (None if grid is None else _by_step(grid, columns, group // parts) for grid in (scale_EOG, zero_EOG))
    assert scale is not None
    return Codes(weight_EOI.contiguous(), scale, zero, group)


def quantized_experts_mm(
    x_NI: Tensor,
    packed: Codes | QuantizedExperts,
    starts_E1: Tensor,
    x_scale_NG: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """See the reference. Groups that the kernel does not take are widened before, on both sides."""
    codes, scale, zero, group = packed
    arrays = {"x": x_NI, "codes": codes, "scale": scale, "zero": zero, "x_scale": x_scale_NG, "starts": starts_E1}
    function = _experts if isinstance(packed, Codes) else _widened_experts
    (out_NO,) = call(function, arrays, group=group, out_dtype=_name(out_dtype or x_NI.dtype))
    return out_NO


def _product(x_TI: Tensor, packed: Codes, x_scale_TG: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    arrays = {"x": x_TI, "codes": packed.codes, "scale": packed.scale, "x_scale": x_scale_TG}
    (out_TO,) = call(_dense, arrays, group=packed.group, out_dtype=_name(out_dtype))
    return out_TO


def _by_step(grid: Tensor, columns: int, group: int) -> Tensor:
    """As :func:`dovetail_tpu.kernels.quantized_matmul.scales_by_step`, on the host: ``[..., S, G, O]``."""
    steps, per_step = groups_by_step(columns, group)
    padded = F.pad(grid.float(), (0, steps * per_step - grid.shape[-1]))
    by_step = padded.view(*grid.shape[:-1], steps, per_step)  # [..., O, S, G]
    return by_step.movedim(-3, -1).contiguous()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dense(
    x: Array, codes: Array, scale: Array, x_scale: Array | None, *, group: int, out_dtype: str, chip: Chip | None
) -> tuple[Array]:
    weight = Weight(codes[None], scale[None], None, group)
    return (quantized_matmul(x, weight, x_scale, out_dtype=out_dtype, chip=chip, interpret=chip is None),)


def _pairs(x: Array, codes: Array, scale: Array, zero: Array | None, *, group: int, chip: Chip | None) -> tuple[Array]:
    return (int4_matmul.int4_matmul(x, codes, scale, zero, group=group, chip=chip, interpret=chip is None),)


def _experts(
    x: Array,
    codes: Array,
    scale: Array,
    zero: Array | None,
    x_scale: Array | None,
    starts: Array,
    *,
    group: int,
    out_dtype: str,
    chip: Chip | None,
) -> tuple[Array]:
    weight = Weight(codes, scale, zero, group)
    return (grouped_matmul(x, weight, starts, x_scale, out_dtype=out_dtype, chip=chip, interpret=chip is None),)


def _widened_experts(
    x: Array,
    codes: Array,
    scale: Array,
    zero: Array | None,
    x_scale: Array | None,
    starts: Array,
    *,
    group: int,
    out_dtype: str,
    chip: Chip | None,
) -> tuple[Array]:
    dtype = out_dtype if x_scale is not None else x.dtype
    wide = x if x_scale is None else int4_matmul.widened(x, x_scale, None, group, dtype)
    weight = Weight(int4_matmul.widened(codes, scale, zero, group, dtype), None, None, codes.shape[2])
    return (grouped_matmul(wide, weight, starts, out_dtype=out_dtype, chip=chip, interpret=chip is None),)
