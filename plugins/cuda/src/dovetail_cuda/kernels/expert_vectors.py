"""Mixtures of experts for so few tokens that hardly two choose the same expert: each choice reads its expert's weights.

C: choices of all tokens; others as in :mod:`dovetail.contracts`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail_cuda.kernels.overlap import overlapped, release, wait


def experts_of_few(
    x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, expert_ids_TA: Tensor, expert_weights_TA: Tensor
) -> Tensor:
    """See :func:`dovetail.ops.reference.moe_experts`."""
    tokens, choices = expert_ids_TA.shape
    experts, width, inner = down_EDF.shape
    hidden_CF = torch.empty((tokens * choices, inner), dtype=x_TD.dtype, device=x_TD.device)
    out_TD = torch.empty((tokens, width), dtype=x_TD.dtype, device=x_TD.device)
    overlap = overlapped(out_TD.device)
    rows, depth = 2, min(2048, triton.next_power_of_2(width))
    _inner_kernel[(triton.cdiv(inner, rows), tokens * choices)](
        x_TD,
        gate_up_EFD,
        hidden_CF,
        expert_ids_TA,
        experts,
        inner,
        x_TD.stride(0),
        *gate_up_EFD.stride()[:2],
        *expert_ids_TA.stride(),
        CHOICES=choices,
        WIDTH=width,
        ROWS=rows,
        DEPTH=depth,
        num_warps=4,
        **overlap,
    )
    rows, depth = 2, min(256, triton.next_power_of_2(inner))
    _outer_kernel[(triton.cdiv(width, rows), tokens)](
        hidden_CF,
        down_EDF,
        out_TD,
        expert_ids_TA,
        expert_weights_TA,
        experts,
        width,
        *down_EDF.stride()[:2],
        *expert_ids_TA.stride(),
        *expert_weights_TA.stride(),
        CHOICES=choices,
        PADDED=triton.next_power_of_2(choices),
        INNER=inner,
        ROWS=rows,
        DEPTH=depth,
        num_warps=4,
        **overlap,
    )
    return out_TD


@triton.jit
def _inner_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    experts: tl.tensor,
    inner: tl.tensor,
    x_stride: tl.tensor,
    weight_stride_e: tl.tensor,
    weight_stride_o: tl.tensor,
    ids_stride_t: tl.tensor,
    ids_stride_a: tl.tensor,
    CHOICES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """``silu(gate) × up`` of a choice, for some of its expert's rows."""
    release(OVERLAP)
    wait(OVERLAP)
    choice = tl.program_id(1)
    token = choice // CHOICES
    expert = tl.load(ids_ptr + token * ids_stride_t + (choice % CHOICES) * ids_stride_a)
    if (expert < 0) | (expert >= experts):
        return
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < inner
    k = tl.arange(0, DEPTH)
    x_places = x_ptr + token.to(tl.int64) * x_stride + k
    gate_places = weight_ptr + expert.to(tl.int64) * weight_stride_e + rows[:, None] * weight_stride_o + k[None, :]
    gate = tl.zeros([ROWS, DEPTH], dtype=tl.float32)
    up = tl.zeros([ROWS, DEPTH], dtype=tl.float32)
    for at in tl.static_range(0, WIDTH, DEPTH):
        mask = row_mask[:, None] & (at + k < WIDTH)[None, :]
        x = tl.load(x_places + at, mask=at + k < WIDTH, other=0.0).to(tl.float32)[None, :]
        gate_weight = tl.load(gate_places + at, mask=mask, other=0.0)
        up_weight = tl.load(gate_places + inner * weight_stride_o + at, mask=mask, other=0.0)
        gate += gate_weight.to(tl.float32) * x
        up += up_weight.to(tl.float32) * x
    gate_sum, up_sum = tl.sum(gate, axis=1), tl.sum(up, axis=1)
    out = gate_sum / (1.0 + tl.exp(-gate_sum)) * up_sum
    tl.store(out_ptr + choice.to(tl.int64) * inner + rows, out.to(out_ptr.dtype.element_ty), mask=row_mask)


@triton.jit
def _outer_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    experts: tl.tensor,
    width: tl.tensor,
    weight_stride_e: tl.tensor,
    weight_stride_o: tl.tensor,
    ids_stride_t: tl.tensor,
    ids_stride_a: tl.tensor,
    factors_stride_t: tl.tensor,
    factors_stride_a: tl.tensor,
    CHOICES: tl.constexpr,
    PADDED: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Some outputs of a token: all its experts' products side by side, and their weighted sum."""
    release(OVERLAP)
    wait(OVERLAP)
    token = tl.program_id(1).to(tl.int64)
    choices = tl.arange(0, PADDED)
    ids = tl.load(ids_ptr + token * ids_stride_t + choices * ids_stride_a, mask=choices < CHOICES, other=-1)
    chosen = (ids >= 0) & (ids < experts)
    factors = tl.load(factors_ptr + token * factors_stride_t + choices * factors_stride_a, mask=chosen, other=0.0)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, DEPTH)
    places = weight_ptr + ids.to(tl.int64)[:, None] * weight_stride_e + rows[None, :] * weight_stride_o
    x_places = x_ptr + (token * CHOICES + choices)[:, None] * INNER + k[None, :]
    acc = tl.zeros([PADDED, ROWS, DEPTH], dtype=tl.float32)
    for at in tl.static_range(0, INNER, DEPTH):
        deep = at + k < INNER
        x = tl.load(x_places + at, mask=chosen[:, None] & deep[None, :], other=0.0).to(tl.float32)
        mask = chosen[:, None, None] & (rows < width)[None, :, None] & deep[None, None, :]
        weight = tl.load(places[:, :, None] + (at + k)[None, None, :], mask=mask, other=0.0)
        acc += weight.to(tl.float32) * x[:, None, :]
    products = tl.sum(acc, axis=2) * factors.to(tl.float32)[:, None]
    tl.store(out_ptr + token * width + rows, tl.sum(products, axis=0).to(out_ptr.dtype.element_ty), mask=rows < width)
