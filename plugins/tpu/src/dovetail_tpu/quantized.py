"""Products with weights in 8 and 4 bits for the op table: torch's tensors in and out, kernels in between.

Weights stay as they are. Several devices have some outputs each, with their scales, or some inputs, with the scales of
their groups. Groups that kernels do not take are widened before. Meanings: :mod:`dovetail.ops.reference`.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import NamedTuple

import jax.numpy as jnp
import torch
from jax import Array
from jax.typing import DTypeLike
from torch import Tensor

from dovetail.errors import ConfigError
from dovetail_tpu import bridges
from dovetail_tpu.calls import call
from dovetail_tpu.kernels import int4_matmul
from dovetail_tpu.kernels.chip import Chip
from dovetail_tpu.kernels.grouped_matmul import grouped_matmul
from dovetail_tpu.kernels.product_tiles import fits_lanes
from dovetail_tpu.kernels.quantized_matmul import Weight, grids_by_step, parts_of, quantized_matmul
from dovetail_tpu.mesh import AXIS, Split

DIMS = MappingProxyType({"x": "TI", "codes": "OI", "scale": "GO", "zero": "GO", "x_scale": "TG"})
"""Of a product's operands; see :func:`dovetail_tpu.mesh.over_product`."""


class Codes(NamedTuple):
    """A quantized weight, or those of all experts.

    Attributes:
        codes: ``[O, J]`` or ``[E, O, J]``, an input per column, or two where they are pairs.
        scale, zero: ``[G, O]`` or ``[E, G, O]``, float32: outputs lie along lanes.
        group: inputs that share a scale.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    group: int


def weight_only_pack(weight_OI: Tensor, scale_OG: Tensor, group_size: int | None = None) -> Codes:
    """Put outputs of scales along lanes."""
    return Codes(weight_OI.contiguous(), _across(scale_OG), None, group_size or weight_OI.shape[1])


def weight_only_mm(x_TI: Tensor, packed: Codes, bias_O: Tensor | None = None) -> Tensor:
    """See the reference; the product is rounded before the bias is added."""
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
    scale_1O = weight_scale_O1.expand(outputs, 1).reshape(1, outputs)
    return _product(x_TI, Codes(weight_OI, scale_1O, None, inputs), x_scale_T1.expand(len(x_TI), 1), out_dtype)


def block_scaled_pack(weight_OI: Tensor, scale_OG: Tensor, group_size: int) -> Codes:
    """Put outputs of scales along lanes."""
    return weight_only_pack(weight_OI, scale_OG, group_size)


def block_scaled_mm(x_TI: Tensor, packed: Codes, x_scale_TG: Tensor, out_dtype: torch.dtype) -> Tensor:
    """See the reference."""
    return _product(x_TI, packed, x_scale_TG, out_dtype)


def w4a16_mm(x_TI: Tensor, weight_packed: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int) -> Tensor:
    """See the reference."""
    arrays = {"x": x_TI, "codes": weight_packed, "scale": scales, "zero": zeros}
    split = _split_of(weight_packed, group_size, x_TI.shape[1])
    (out_TO,) = call(_pairs, arrays, split, {**DIMS, "scale": "OG", "zero": "OG"}, group=group_size)
    return out_TO


def quantized_experts_pack(
    weight_EOI: Tensor, scale_EOG: Tensor, zero_EOG: Tensor | None = None, group_size: int | None = None
) -> Codes:
    """Put outputs of scales along lanes."""
    inputs = weight_EOI.shape[2] * (2 if weight_EOI.dtype == torch.uint8 else 1)
    zero = None if zero_EOG is None else _across(zero_EOG)
    return Codes(weight_EOI.contiguous(), _across(scale_EOG), zero, group_size or inputs)


def quantized_experts_mm(
    x_NI: Tensor,
    packed: Codes,
    starts_E1: Tensor,
    x_scale_NG: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """See the reference."""
    return _product(x_NI, packed, x_scale_NG, out_dtype or x_NI.dtype, starts_E1)


def _product(
    x_TI: Tensor,
    packed: Codes,
    x_scale_TG: Tensor | None,
    out_dtype: torch.dtype,
    starts_E1: Tensor | None = None,
) -> Tensor:
    codes, scale, zero, group = packed
    arrays = {"x": x_TI, "codes": codes, "scale": scale, "zero": zero, "x_scale": x_scale_TG, "starts": starts_E1}
    split, name = _split_of(codes, group, x_TI.shape[1]), str(out_dtype).removeprefix("torch.")
    (out_TO,) = call(_multiply, arrays, split, DIMS, group=group, out_dtype=name)
    return out_TO


def _across(grid: Tensor) -> Tensor:
    return grid.float().transpose(-1, -2).contiguous()


def _split_of(codes: Tensor, group: int, inputs: int) -> Split:
    """Along what a weight was split when it was adopted.

    Raises:
        ConfigError: groups of inputs are cut.
    """
    spec = bridges.current().spec_of(codes)
    if AXIS not in spec:
        return Split.WHOLE
    if spec[-1] != AXIS:
        return Split.OUTPUTS
    if group < inputs and inputs % group:
        raise ConfigError(
            f"{inputs} inputs in groups of {group}, the last of which is shorter, are not split among devices. Take "
            "one device, or a checkpoint with other groups."
        )
    return Split.INPUTS


def _pairs(x: Array, codes: Array, scale: Array, zero: Array | None, *, group: int, chip: Chip | None) -> tuple[Array]:
    return (int4_matmul.int4_matmul(x, codes, scale, zero, group=group, chip=chip, interpret=chip is None),)


def _multiply(
    x: Array,
    codes: Array,
    scale: Array,
    zero: Array | None,
    x_scale: Array | None,
    starts: Array | None,
    *,
    group: int,
    out_dtype: str,
    chip: Chip | None,
) -> tuple[Array]:
    """Of one weight, or of those of all experts."""
    if starts is None:
        codes, scale = codes[None], scale[None]
    if _fits(codes, group):
        weight = _by_step(codes, scale, zero, group)
    else:
        dtype = x.dtype if x_scale is None else jnp.dtype(out_dtype)
        x = x if x_scale is None else int4_matmul.widened(x, x_scale, None, group, dtype)
        weight, x_scale = _widened(codes, scale, zero, group, dtype), None
    interpret = chip is None
    if starts is None:
        return (quantized_matmul(x, weight, x_scale, out_dtype=out_dtype, chip=chip, interpret=interpret),)
    return (grouped_matmul(x, weight, starts, x_scale, out_dtype=out_dtype, chip=chip, interpret=interpret),)


def _fits(codes_EOJ: Array, group: int) -> bool:
    parts = parts_of(codes_EOJ.dtype)
    return group % parts == 0 and fits_lanes(codes_EOJ.shape[2], group // parts)


def _by_step(codes_EOJ: Array, scale_EGO: Array, zero_EGO: Array | None, group: int) -> Weight:
    columns, own = codes_EOJ.shape[2], group // parts_of(codes_EOJ.dtype)
    zero_ESGO = None if zero_EGO is None else grids_by_step(zero_EGO, columns, own)
    return Weight(codes_EOJ, grids_by_step(scale_EGO, columns, own), zero_ESGO, group)


def _widened(codes_EOJ: Array, scale_EGO: Array, zero_EGO: Array | None, group: int, dtype: DTypeLike) -> Weight:
    zero_EOG = None if zero_EGO is None else jnp.swapaxes(zero_EGO, 1, 2)
    wide_EOI = int4_matmul.widened(codes_EOJ, jnp.swapaxes(scale_EGO, 1, 2), zero_EOG, group, dtype)
    return Weight(wide_EOI, None, None, wide_EOI.shape[2])
