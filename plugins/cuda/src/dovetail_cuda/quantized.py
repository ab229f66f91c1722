"""The platform's operations on numbers of 8 and 4 bits. Meanings: :mod:`dovetail.ops.reference`.

What a chip, a dtype or an odd group size keeps from the kernels runs on the reference, which is decided when a weight
is packed, or by the dtypes of an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType
from torch.nn.functional import scaled_mm as library_scaled_mm

from dovetail.ops import reference
from dovetail.ops.reference import QuantizedExperts, ScaledWeight
from dovetail_cuda.kernels.narrow import Codes, multiprocessors, product, wide
from dovetail_cuda.kernels.quantize import has_fp8, quantize_rows
from dovetail_cuda.narrow_ways import FEW_TOKENS, MANY_TOKENS, Way, way

FP8 = torch.float8_e4m3fn
BLOCK = 128
"""Outputs and inputs of the blocks that cuBLAS knows."""
_LIBRARY_BLOCKS = (9, 0)
"""Compute capability of the chips on which cuBLAS knows them."""


@dataclass(frozen=True, slots=True)
class BlockScaled:
    """A weight that is multiplied with activations of its own dtype, group by group.

    Attributes:
        block_scale_GB: where the scales are those of square blocks: one for each.
    """

    codes: Codes
    block_scale_GB: Tensor | None


def table() -> Mapping[str, Callable[..., Any]]:
    """Overrides for :class:`dovetail.contracts.ops.OpTable`."""
    return {
        "quantize_rows": quantize_rows,
        "weight_only_pack": weight_only_pack,
        "weight_only_mm": weight_only_mm,
        "scaled_mm_pack": scaled_mm_pack,
        "scaled_mm": scaled_mm,
        "block_scaled_pack": block_scaled_pack,
        "block_scaled_mm": block_scaled_mm,
        "w4a16_mm": w4a16_mm,
        "quantized_experts_pack": quantized_experts_pack,
        "quantized_experts_mm": quantized_experts_mm,
    }


def weight_only_pack(weight_OI: Tensor, scale_OG: Tensor, group_size: int | None = None) -> Codes | ScaledWeight:
    """The weight as it is, its scales with outputs side by side."""
    group = group_size or weight_OI.shape[1]
    if not _fits(weight_OI, group) or _has_nan(weight_OI):
        return reference.weight_only_pack(weight_OI, scale_OG, group_size)
    return _codes(weight_OI, scale_OG, group)


def weight_only_mm(x_TI: Tensor, packed: Codes | ScaledWeight, bias_O: Tensor | None = None) -> Tensor:
    """See the reference."""
    if isinstance(packed, ScaledWeight):
        return reference.weight_only_mm(x_TI, packed, bias_O)
    return _weight_only(x_TI, packed, bias_O)


def w4a16_mm(x_TI: Tensor, weight_packed: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int) -> Tensor:
    """See the reference."""
    if not _fits(weight_packed, group_size):
        return reference.w4a16_mm(x_TI, weight_packed, scales, zeros, group_size)
    return _weight_only(x_TI, Codes(weight_packed.contiguous(), scales, zeros, group_size), None)


def scaled_mm_pack(weight_OI: Tensor) -> Tensor:
    """The weight as it is."""
    return weight_OI.contiguous()


def scaled_mm(
    x_TI: Tensor, weight_OI: Tensor, x_scale_T1: Tensor, weight_scale_O1: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """See the reference; int8 sums are exact."""
    outputs, inputs = weight_OI.shape
    if not _sums_exactly_enough(weight_OI, inputs, out_dtype):
        return reference.scaled_mm(x_TI, weight_OI, x_scale_T1, weight_scale_O1, out_dtype)
    x_scale_T1, weight_scale_O1 = x_scale_T1.expand(len(x_TI), 1), weight_scale_O1.expand(outputs, 1)
    aligned = outputs % 16 == 0 and inputs % 16 == 0
    if weight_OI.dtype == FP8 and out_dtype == torch.bfloat16 and aligned and len(x_TI) > FEW_TOKENS:
        scales = x_scale_T1.contiguous(), weight_scale_O1.t().contiguous()
        return torch._scaled_mm(x_TI.contiguous(), weight_OI.t(), *scales, out_dtype=out_dtype, use_fast_accum=True)
    return product(x_TI, Codes(weight_OI.contiguous(), weight_scale_O1, None, inputs), x_scale_T1, None, out_dtype)


def block_scaled_pack(weight_OI: Tensor, scale_OG: Tensor, group_size: int) -> BlockScaled | ScaledWeight:
    """The weight as it is, its scales with outputs side by side, and once per block if blocks are square."""
    if not _fits(weight_OI, group_size):
        return reference.block_scaled_pack(weight_OI, scale_OG, group_size)
    return BlockScaled(_codes(weight_OI, scale_OG, group_size), _square(weight_OI, scale_OG, group_size))


def block_scaled_mm(
    x_TI: Tensor, packed: BlockScaled | ScaledWeight, x_scale_TG: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """See the reference."""
    if isinstance(packed, ScaledWeight):
        return reference.block_scaled_mm(x_TI, packed, x_scale_TG, out_dtype)
    codes, tokens = packed.codes, len(x_TI)
    if not _sums_exactly_enough(codes.weight, codes.group_size, out_dtype):
        plain = ScaledWeight(codes.weight, codes.scale_OG, codes.group_size)
        return reference.block_scaled_mm(x_TI, plain, x_scale_TG, out_dtype)
    library = out_dtype == torch.bfloat16 and tokens > FEW_TOKENS and tokens % 4 == 0
    if library and packed.block_scale_GB is not None:
        return library_scaled_mm(
            x_TI.contiguous(),
            codes.weight.t(),
            x_scale_TG.t().contiguous().t(),
            ScalingType.BlockWise1x128,
            packed.block_scale_GB,
            ScalingType.BlockWise128x128,
            output_dtype=out_dtype,
        )
    return product(x_TI, codes, x_scale_TG, None, out_dtype)


def quantized_experts_pack(
    weight_EOI: Tensor, scale_EOG: Tensor, zero_EOG: Tensor | None = None, group_size: int | None = None
) -> Codes | QuantizedExperts:
    """The weights as they are, their scales with outputs side by side."""
    plain = reference.quantized_experts_pack(weight_EOI, scale_EOG, zero_EOG, group_size)
    if not _fits(weight_EOI, plain.group_size) or _has_nan(weight_EOI):
        return plain
    zero_EOG = None if zero_EOG is None else _side_by_side(zero_EOG)
    return Codes(weight_EOI.contiguous(), _side_by_side(scale_EOG), zero_EOG, plain.group_size)


def quantized_experts_mm(
    x_NI: Tensor,
    packed: Codes | QuantizedExperts,
    starts_E1: Tensor,
    x_scale_NG: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """See the reference, which waits for the device; this does not."""
    dtype = out_dtype or x_NI.dtype
    if isinstance(packed, QuantizedExperts):
        return reference.quantized_experts_mm(x_NI, packed, starts_E1, x_scale_NG, dtype)
    if x_scale_NG is not None and not _sums_exactly_enough(packed.weight, packed.group_size, dtype):
        plain = QuantizedExperts(packed.weight, packed.scale_OG, packed.zero_OG, packed.group_size)
        return reference.quantized_experts_mm(x_NI, plain, starts_E1, x_scale_NG, dtype)
    return product(x_NI, packed, x_scale_NG, None, dtype, starts_E1=starts_E1)


def _weight_only(x_TI: Tensor, codes: Codes, bias_O: Tensor | None) -> Tensor:
    processors = multiprocessors(x_TI.device)
    how = Way.STREAM if x_TI.dtype == torch.float32 else way(x_TI, codes, processors)
    if how == Way.STREAM:
        return product(x_TI, codes, None, bias_O, x_TI.dtype)
    if how == Way.WIDEN_FIRST:
        return F.linear(x_TI, wide(codes, x_TI.dtype), bias_O)
    from dovetail_cuda.kernels.many_rows import many_rows_product

    if len(x_TI) > MANY_TOKENS:
        # a step of fewer tokens may widen first; one that is rehearsed has to take as much memory
        torch.empty(codes.shape, dtype=x_TI.dtype, device=x_TI.device)
    return many_rows_product(x_TI, codes, bias_O, processors, rows=how.value)


def _codes(weight_OI: Tensor, scale_OG: Tensor, group_size: int) -> Codes:
    return Codes(weight_OI.contiguous(), _side_by_side(scale_OG), None, group_size)


def _side_by_side(grid: Tensor) -> Tensor:
    """The same numbers in float32, those of neighbouring outputs next to each other."""
    return grid.transpose(-1, -2).float().contiguous().transpose(-1, -2)


def _fits(weight: Tensor, group_size: int) -> bool:
    """Whether the kernel takes the weight."""
    inputs = weight.shape[-1] * (2 if weight.dtype == torch.uint8 else 1)
    known = weight.dtype in (torch.int8, torch.uint8) or (weight.dtype == FP8 and has_fp8(weight.device))
    return known and (group_size >= inputs or group_size % 32 == 0)


def _has_nan(weight_OI: Tensor) -> bool:
    """Widened, they would become numbers."""
    return weight_OI.dtype == FP8 and bool((weight_OI.view(torch.uint8) & 0x7F == 0x7F).any())


def _sums_exactly_enough(weight_OI: Tensor, group_size: int, out_dtype: torch.dtype) -> bool:
    """fp8 products are summed with fewer digits than float32 has."""
    return weight_OI.dtype == torch.int8 or (out_dtype != torch.float32 and _fits(weight_OI, group_size))


def _square(weight_OI: Tensor, scale_OG: Tensor, group_size: int) -> Tensor | None:
    """``[G, O / 128]``, inputs side by side, where the scales are those of blocks that cuBLAS knows; else None."""
    outputs, inputs = weight_OI.shape
    aligned = group_size == BLOCK and outputs % BLOCK == 0 and inputs % (4 * BLOCK) == 0
    if not aligned or weight_OI.dtype != FP8 or torch.cuda.get_device_capability(weight_OI.device) != _LIBRARY_BLOCKS:
        return None
    scale_BOG = scale_OG.float().reshape(outputs // BLOCK, BLOCK, -1)
    return scale_BOG[:, 0].contiguous().t() if bool((scale_BOG == scale_BOG[:, :1]).all()) else None
