"""Gated activations: an activation of the first half of each row, times the second half."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail_cuda.kernels.overlap import overlapped, release, wait
from dovetail_cuda.kernels.rows import as_rows

BLOCK = 1024


def silu_and_mul(x_T2F: Tensor) -> Tensor:
    """See :func:`dovetail.ops.reference.silu_and_mul`."""
    return _gate(x_T2F, tanh=False)


def gelu_tanh_and_mul(x_T2F: Tensor) -> Tensor:
    """See :func:`dovetail.ops.reference.gelu_tanh_and_mul`."""
    return _gate(x_T2F, tanh=True)


def _gate(x_T2F: Tensor, *, tanh: bool) -> Tensor:
    width = x_T2F.shape[-1] // 2
    out = torch.empty((*x_T2F.shape[:-1], width), dtype=x_T2F.dtype, device=x_T2F.device)
    if out.numel():
        x = as_rows(x_T2F)
        block = min(BLOCK, triton.next_power_of_2(width))
        grid = (x.count, triton.cdiv(width, block))
        overlap = overlapped(out.device)
        _gate_kernel[grid](x.tensor, out, x.inner, *x.strides, width, TANH=tanh, BLOCK=block, **overlap)
    return out


@triton.jit
def _gate_kernel(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    inner: tl.tensor,
    outer_stride: tl.tensor,
    inner_stride: tl.tensor,
    width: tl.tensor,
    TANH: tl.constexpr,
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
    tl.store(out_ptr + row * width + columns, out.to(out_ptr.dtype.element_ty), mask=mask)
