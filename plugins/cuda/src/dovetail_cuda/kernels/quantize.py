"""Activations in 8 bits, each row or group of a row by its own largest magnitude."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail.ops import reference
from dovetail_cuda.kernels.overlap import overlapped, release, wait

TILE = 2048
"""Elements of a program's groups together, where groups are shorter."""


def quantize_rows(x_TI: Tensor, dtype: torch.dtype, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`dovetail.ops.reference.quantize_rows`, with which it agrees bit for bit."""
    if dtype != torch.int8 and not has_fp8(x_TI.device):
        return reference.quantize_rows(x_TI, dtype, group_size)
    x = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
    tokens, inputs = x.shape
    group = group_size or inputs
    groups = triton.cdiv(inputs, group)
    values_TI, scale_TG = narrow_rows(tokens, inputs, dtype, group, x.device)
    if values_TI.numel():
        block = triton.next_power_of_2(group)
        rows = max(1, min(TILE // block, triton.next_power_of_2(tokens * groups)))
        _quantize_kernel[(triton.cdiv(tokens * groups, rows),)](
            x,
            values_TI,
            scale_TG,
            tokens * groups,
            inputs,
            x.stride(0),
            groups,
            group,
            **narrowing(dtype),
            ROWS=rows,
            BLOCK=block,
            **overlapped(x.device),
            num_warps=min(16, max(1, rows * block // 512)),
        )
    return values_TI, scale_TG


def narrow_rows(
    tokens: int, inputs: int, dtype: torch.dtype, group: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Room for what :func:`quantize_rows` returns; the scales of neighbouring tokens lie side by side."""
    values_TI = torch.empty((tokens, inputs), dtype=dtype, device=device)
    return values_TI, torch.empty((triton.cdiv(inputs, group), tokens), dtype=torch.float32, device=device).t()


def narrowing(dtype: torch.dtype) -> dict[str, float | bool]:
    """Arguments of kernels that quantize."""
    return {"LARGEST": 127.0 if dtype == torch.int8 else torch.finfo(dtype).max, "INTEGER": dtype == torch.int8}


def tile_group(width: int, dtype: torch.dtype, group_size: int | None, device: torch.device) -> int | None:
    """Columns of a tile that share a scale, in kernels that end with :func:`narrow_tile`; None if the format is none of
    theirs.
    """
    if dtype != torch.int8 and not has_fp8(device):
        return None
    size = width if group_size is None else min(group_size, width)
    group = int(triton.next_power_of_2(size))
    return group if size in (width, group) else None


def has_fp8(device: torch.device) -> bool:
    """Whether the chip converts to fp8; older ones lack the instructions."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit(do_not_specialize=["count"])
def _quantize_kernel(
    x_ptr: tl.tensor,
    values_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    count: tl.tensor,
    inputs: tl.tensor,
    x_stride_t: tl.tensor,
    groups: tl.tensor,
    group: tl.tensor,
    LARGEST: tl.constexpr,
    INTEGER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    release(OVERLAP)
    wait(OVERLAP)
    places = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens, begins = (places // groups).to(tl.int64)[:, None], (places % groups * group)[:, None]
    within = tl.arange(0, BLOCK)[None, :]
    mask = (places < count)[:, None] & (within < group) & (begins + within < inputs)
    x = tl.load(x_ptr + tokens * x_stride_t + begins + within, mask=mask, other=0.0).to(tl.float32)
    values, scale = _narrow(x, LARGEST, INTEGER)
    tl.store(scale_ptr + places % groups * (count // groups) + places // groups, scale, mask=places < count)
    tl.store(values_ptr + tokens * inputs + begins + within, values.to(values_ptr.dtype.element_ty), mask=mask)


@triton.jit
def narrow_tile(
    x: tl.tensor,
    scale_ptr: tl.tensor,
    first_row: tl.tensor,
    first_group: tl.tensor,
    count: tl.tensor,
    groups: tl.tensor,
    GROUP: tl.constexpr,
    LARGEST: tl.constexpr,
    INTEGER: tl.constexpr,
) -> tl.tensor:
    """Quantize a float32 tile of whole groups.

    Args:
        x: zero beyond the last column.
        scale_ptr: of scales as :func:`narrow_rows` lays them; those of the tile are stored.
        first_row, first_group: of the tile.
        count, groups: of all rows, and of each one's groups.

    Returns:
        The values, still in float32.
    """
    PARTS: tl.constexpr = x.shape[1] // GROUP
    values, scale = _narrow(tl.reshape(x, (x.shape[0] * PARTS, GROUP)), LARGEST, INTEGER)
    parts = tl.arange(0, x.shape[0] * PARTS)
    rows, places = first_row + parts // PARTS, first_group + parts % PARTS
    tl.store(scale_ptr + places * count + rows, scale, mask=(rows < count) & (places < groups))
    return tl.reshape(values, x.shape)


@triton.jit
def _narrow(x: tl.tensor, LARGEST: tl.constexpr, INTEGER: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Values of each row, still in float32, and its scale."""
    # as integers, magnitudes are ordered as they are, and infinities and NaN come last
    peak = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    scale = tl.div_rn(tl.maximum(peak, 0x2B8CBCCC).to(tl.float32, bitcast=True), LARGEST)
    values = tl.minimum(tl.maximum(tl.div_rn(x, scale[:, None]), -LARGEST), LARGEST)
    if INTEGER:
        values = (values + 12582912.0) - 12582912.0  # 1.5 × 2²³, beside which there is no fraction: ties go to even
    return values, scale
