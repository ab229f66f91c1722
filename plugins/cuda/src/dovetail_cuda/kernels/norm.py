"""Root-mean-square norm, alone or after the residual addition, wide or in 8 bits."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail_cuda.kernels.overlap import overlapped, release, wait
from dovetail_cuda.kernels.quantize import narrow_rows, narrow_tile, narrowing, quantize_rows, tile_group
from dovetail_cuda.kernels.rows import as_rows

TILE = 2048
"""Elements of a program's rows together, where rows are shorter."""
PER_WARP = 512
"""Elements."""


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See :func:`dovetail.ops.reference.rms_norm`. The weight may be in a wider dtype than ``x``."""
    out = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    _launch(x_TD, None, weight_D, out, None, eps)
    return out


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See :func:`dovetail.ops.reference.add_rms_norm`."""
    out, total = (torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device) for _ in range(2))
    _launch(x_TD, residual_TD, weight_D, out, total, eps)
    return out, total


def add_rms_norm_quantize(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype, group_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`dovetail.ops.reference.add_rms_norm_quantize`."""
    group = tile_group(x_TD.shape[1], dtype, group_size, x_TD.device)
    if group is None:
        normed, total = add_rms_norm(x_TD, residual_TD, weight_D, eps)
        return *quantize_rows(normed, dtype, group_size), total
    values, scale = narrow_rows(x_TD.shape[0], x_TD.shape[1], dtype, group, x_TD.device)
    total = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    _launch(x_TD, residual_TD, weight_D, values, total, eps, scale, group)
    return values, scale, total


def _launch(
    x_TD: Tensor,
    residual_TD: Tensor | None,
    weight_D: Tensor,
    out: Tensor,
    total: Tensor | None,
    eps: float,
    scale_TG: Tensor | None = None,
    group: int = 0,
) -> None:
    if not out.numel():
        return
    x = as_rows(x_TD)
    residual = x if residual_TD is None else as_rows(residual_TD)
    block, rows, warps = _cut(x.width, x.count)
    _rms_norm_kernel[(-(-x.count // rows),)](
        x.tensor,
        residual.tensor,
        weight_D.contiguous(),
        out,
        out if total is None else total,
        out if scale_TG is None else scale_TG,
        x.count,
        x.inner,
        *x.strides,
        *residual.strides,
        x.width,
        0 if scale_TG is None else scale_TG.shape[1],
        eps,
        ADD=residual_TD is not None,
        GROUP=group,
        **narrowing(out.dtype),
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
        **overlapped(out.device),
    )


@cache
def _cut(width: int, count: int) -> tuple[int, int, int]:
    """Columns and rows of a tile, and warps."""
    block = triton.next_power_of_2(width)
    rows = max(1, min(TILE // block, triton.next_power_of_2(count)))
    return block, rows, min(16, max(1, rows * block // PER_WARP))


@triton.jit(do_not_specialize=["count"])
def _rms_norm_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    total_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    count: tl.tensor,
    inner: tl.tensor,
    x_outer_stride: tl.tensor,
    x_inner_stride: tl.tensor,
    residual_outer_stride: tl.tensor,
    residual_inner_stride: tl.tensor,
    width: tl.tensor,
    groups: tl.tensor,
    eps: tl.tensor,
    ADD: tl.constexpr,
    GROUP: tl.constexpr,
    LARGEST: tl.constexpr,
    INTEGER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    release(OVERLAP)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    mask = (rows < count) & (columns < width)
    outer, within = rows // inner, rows % inner
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    wait(OVERLAP)
    x = tl.load(x_ptr + outer * x_outer_stride + within * x_inner_stride + columns, mask=mask, other=0.0)
    if ADD:
        places = outer * residual_outer_stride + within * residual_inner_stride + columns
        residual = tl.load(residual_ptr + places, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + rows * width + columns, x, mask=mask)
    x = x.to(tl.float32)
    square = tl.sum(x * x, axis=1) / width
    out = x * tl.rsqrt(square + eps)[:, None] * weight
    if GROUP:
        out = out.to(x_ptr.dtype.element_ty).to(tl.float32)
        out = narrow_tile(out, scale_ptr, tl.program_id(0) * ROWS, 0, count, groups, GROUP, LARGEST, INTEGER)
    tl.store(out_ptr + rows * width + columns, out.to(out_ptr.dtype.element_ty), mask=mask)
