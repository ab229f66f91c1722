"""Mixtures of experts: tokens sorted by expert, two grouped products, and the weighted sum of each token's choices.

Rows of one expert are cut into tiles, so that the grid depends on the numbers of choices and experts alone. C: choices
of all tokens, in the order of their experts; O, I: outputs and inputs of a product; others as in
:mod:`dovetail.contracts`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail_cuda.kernels.activation import silu_and_mul
from dovetail_cuda.kernels.segments import segment_of


class _Order(NamedTuple):
    """Which choice each sorted row is, and the first row of each expert; choices of no expert come last."""

    choices_C: Tensor
    starts_E1: Tensor


def moe_experts(
    x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, expert_ids_TA: Tensor, expert_weights_TA: Tensor
) -> Tensor:
    """See :func:`dovetail.ops.reference.moe_experts`."""
    tokens, choices = expert_ids_TA.shape
    width = down_EDF.shape[1]
    out_TD = torch.empty((tokens, width), dtype=x_TD.dtype, device=x_TD.device)
    if not out_TD.numel():
        return out_TD
    order = _sort(expert_ids_TA, len(down_EDF))
    gate_up_CF = _product(x_TD, gate_up_EFD, order, rows_per_input=choices, sorts=True)
    y_CD = _product(silu_and_mul(gate_up_CF), down_EDF, order, rows_per_input=1, sorts=False)
    block = min(1024, triton.next_power_of_2(width))
    _combine_kernel[(tokens, triton.cdiv(width, block))](
        y_CD,
        expert_ids_TA,
        expert_weights_TA,
        out_TD,
        width,
        *expert_ids_TA.stride(),
        *expert_weights_TA.stride(),
        EXPERTS=len(down_EDF),
        CHOICES=choices,
        BLOCK=block,
    )
    return out_TD


def _sort(expert_ids_TA: Tensor, experts: int) -> _Order:
    ids_C = expert_ids_TA.flatten()
    ids_C = torch.where((ids_C >= 0) & (ids_C < experts), ids_C, experts)
    sorted_C, choices_C = ids_C.sort(stable=True)
    bounds_E1 = torch.arange(experts + 1, dtype=sorted_C.dtype, device=ids_C.device)
    return _Order(choices_C, torch.searchsorted(sorted_C, bounds_E1))


def _product(x: Tensor, weight_EOI: Tensor, order: _Order, *, rows_per_input: int, sorts: bool) -> Tensor:
    """Each expert's product with its rows.

    Args:
        x: ``[T, I]`` of which ``rows_per_input`` choices share a row, or ``[C, I]`` in sorted order.
        sorts: reads rows where their tokens are and leaves them sorted; else reads sorted rows and puts each back to
            the place of its choice.
    """
    experts, outputs, inputs = weight_EOI.shape
    rows = len(order.choices_C)
    out_CO = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    wide = x.element_size() == 4
    block_m = 16 if wide else min(128, max(16, triton.next_power_of_2(rows // experts)))
    block_n, block_k = (32, 32) if wide else (128 if block_m >= 64 else 64, 64)
    _product_kernel[(triton.cdiv(outputs, block_n), rows // block_m + experts)](
        x,
        weight_EOI,
        out_CO,
        *order,
        outputs,
        inputs,
        experts,
        *x.stride(),
        *weight_EOI.stride(),
        ROWS_PER_INPUT=rows_per_input,
        SORTS=sorts,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        EVEN=inputs % block_k == 0,
        PRECISION="ieee" if wide else "tf32",
        num_warps=8 if block_m >= 128 else 4,
        num_stages=4,
    )
    return out_CO


@triton.jit
def _product_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    choices_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    experts: tl.tensor,
    x_stride_t: tl.tensor,
    x_stride_i: tl.tensor,
    weight_stride_e: tl.tensor,
    weight_stride_o: tl.tensor,
    weight_stride_i: tl.tensor,
    ROWS_PER_INPUT: tl.constexpr,
    SORTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    tile = tl.program_id(1)
    expert = segment_of(tile, starts_ptr, 1, experts, BLOCK_M)
    start, end = tl.load(starts_ptr + expert), tl.load(starts_ptr + expert + 1)
    begin = start + (tile - start // BLOCK_M - expert) * BLOCK_M
    if begin >= end:
        return
    rows = begin + tl.arange(0, BLOCK_M)
    row_mask = rows < end
    choices = tl.load(choices_ptr + rows, mask=row_mask, other=0)
    sources = choices // ROWS_PER_INPUT if SORTS else rows
    targets = rows if SORTS else choices
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < outputs
    k = tl.arange(0, BLOCK_K)
    x_places = x_ptr + sources[:, None] * x_stride_t + k[None, :] * x_stride_i
    weight_places = weight_ptr + expert.to(tl.int64) * weight_stride_e
    weight_places += columns[None, :] * weight_stride_o + k[:, None] * weight_stride_i
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for at in range(0, inputs, BLOCK_K):
        if EVEN:
            x = tl.load(x_places, mask=row_mask[:, None], other=0.0)
            weight = tl.load(weight_places, mask=column_mask[None, :], other=0.0)
        else:
            k_mask = at + k < inputs
            x = tl.load(x_places, mask=row_mask[:, None] & k_mask[None, :], other=0.0)
            weight = tl.load(weight_places, mask=column_mask[None, :] & k_mask[:, None], other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
        x_places += BLOCK_K * x_stride_i
        weight_places += BLOCK_K * weight_stride_i
    out_places = out_ptr + targets[:, None].to(tl.int64) * outputs + columns[None, :]
    tl.store(out_places, acc.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def _combine_kernel(
    y_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    out_ptr: tl.tensor,
    width: tl.tensor,
    ids_stride_t: tl.tensor,
    ids_stride_a: tl.tensor,
    weights_stride_t: tl.tensor,
    weights_stride_a: tl.tensor,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for choice in range(CHOICES):
        expert = tl.load(ids_ptr + token * ids_stride_t + choice * ids_stride_a)
        if (expert >= 0) & (expert < EXPERTS):  # nobody computed other rows
            weight = tl.load(weights_ptr + token * weights_stride_t + choice * weights_stride_a).to(tl.float32)
            places = y_ptr + (token * CHOICES + choice) * width + columns
            total += weight * tl.load(places, mask=columns < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + columns, total.to(out_ptr.dtype.element_ty), mask=columns < width)
