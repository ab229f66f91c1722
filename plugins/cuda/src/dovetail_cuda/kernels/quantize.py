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
    values_TI = torch.empty((tokens, inputs), dtype=dtype, device=x.device)
    scale_TG = torch.empty((groups, tokens), dtype=torch.float32, device=x.device).t()  # tokens lie side by side
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
            LARGEST=127.0 if dtype == torch.int8 else torch.finfo(dtype).max,
            INTEGER=dtype == torch.int8,
            ROWS=rows,
            BLOCK=block,
            **overlapped(x.device),
            num_warps=min(16, max(1, rows * block // 512)),
        )
    return values_TI, scale_TG


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
    # as integers, magnitudes are ordered as they are, and infinities and NaN come last
    peak = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    scale = tl.div_rn(tl.maximum(peak, 0x2B8CBCCC).to(tl.float32, bitcast=True), LARGEST)
    tl.store(scale_ptr + places % groups * (count // groups) + places // groups, scale, mask=places < count)
    values = tl.minimum(tl.maximum(tl.div_rn(x, scale[:, None]), -LARGEST), LARGEST)
    if INTEGER:
        values = (values + 12582912.0) - 12582912.0  # 1.5 × 2²³, beside which there is no fraction: ties go to even
    tl.store(values_ptr + tokens * inputs + begins + within, values.to(values_ptr.dtype.element_ty), mask=mask)
