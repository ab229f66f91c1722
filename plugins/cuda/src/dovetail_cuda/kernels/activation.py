"""Gated activations: an activation of the first half of each row, times the second half; wide or in 8 bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail_cuda.kernels.overlap import overlapped, release, wait
from dovetail_cuda.kernels.quantize import narrow_rows, narrow_tile, narrowing, quantize_rows, tile_group
from dovetail_cuda.kernels.rows import as_rows

BLOCK = 1024


def silu_and_mul(x_T2F: Tensor) -> Tensor:
    """See :func:`dovetail.ops.reference.silu_and_mul`."""
    return _gate(x_T2F, tanh=False)


def silu_and_mul_quantize(x_T2F: Tensor, dtype: torch.dtype, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`dovetail.ops.reference.silu_and_mul_quantize`; the same bits as of the two operations here.

    Where one scale holds for a long row, the two are faster: the first computes a row in parts.
    """
    tokens, width = x_T2F.shape[0], x_T2F.shape[1] // 2
    group = tile_group(width, dtype, group_size, x_T2F.device)
    if group is None or group > BLOCK:
        return quantize_rows(silu_and_mul(x_T2F), dtype, group_size)
    values, scale = narrow_rows(tokens, width, dtype, group, x_T2F.device)
    _launch(x_T2F, values, tanh=False, scale_TG=scale, group=group)
    return values, scale


def gelu_tanh_and_mul(x_T2F: Tensor) -> Tensor:
    """See :func:`dovetail.ops.reference.gelu_tanh_and_mul`."""
    return _gate(x_T2F, tanh=True)


def _gate(x_T2F: Tensor, *, tanh: bool) -> Tensor:
    out = torch.empty((*x_T2F.shape[:-1], x_T2F.shape[-1] // 2), dtype=x_T2F.dtype, device=x_T2F.device)
    _launch(x_T2F, out, tanh=tanh)
    return out


def _launch(x_T2F: Tensor, out: Tensor, *, tanh: bool, scale_TG: Tensor | None = None, group: int = 0) -> None:
    if not out.numel():
        return
    x, width = as_rows(x_T2F), out.shape[-1]
    block = min(BLOCK, triton.next_power_of_2(width))
    _gate_kernel[(x.count, triton.cdiv(width, block))](
        x.tensor,
        out,
        out if scale_TG is None else scale_TG,
        x.count,
        x.inner,
        *x.strides,
        width,
        0 if scale_TG is None else scale_TG.shape[1],
        TANH=tanh,
        GROUP=group,
        **narrowing(out.dtype),
        BLOCK=block,
        **overlapped(out.device),
    )


@triton.jit(do_not_specialize=["count"])
def _gate_kernel(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    count: tl.tensor,
    inner: tl.tensor,
    outer_stride: tl.tensor,
    inner_stride: tl.tensor,
    width: tl.tensor,
    groups: tl.tensor,
    TANH: tl.constexpr,
    GROUP: tl.constexpr,
    LARGEST: tl.constexpr,
    INTEGER: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    release(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    x_row = x_ptr + (row // inner) * outer_stride + (row % inner) * inner_stride
    wait(OVERLAP)
    gate = tl.load(x_row + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_row + width + columns, mask=mask, other=0.0).to(tl.float32)
    # tanh(u) is 2 sigmoid(2 u) - 1, so the tanh form of gelu is gate × sigmoid(2 u)
    slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate) if TANH else gate
    out = gate / (1.0 + tl.exp(-slope)) * up
    if GROUP:
        tile = out.to(x_ptr.dtype.element_ty).to(tl.float32)[None, :]
        first = tl.program_id(1) * (BLOCK // GROUP)
        tile = narrow_tile(tile, scale_ptr, tl.program_id(0), first, count, groups, GROUP, LARGEST, INTEGER)
        out = tl.reshape(tile, (BLOCK,))
    tl.store(out_ptr + row * width + columns, out.to(out_ptr.dtype.element_ty), mask=mask)
