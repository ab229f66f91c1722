"""Mixtures of experts: tokens sorted by expert, two grouped products, and the weighted sum of each token's choices.

C: choices of all tokens, in the order of their experts where sorted; O, I: outputs and inputs of a product; others as
in :mod:`dovetail.contracts`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dovetail_cuda.kernels.expert_order import Order, order_by_expert
from dovetail_cuda.kernels.expert_vectors import experts_of_few
from dovetail_cuda.kernels.overlap import overlapped, release, wait

FEW = 4
"""Tokens up to which each choice reads its expert's weights for itself."""
ALIGNED = 16
"""Bytes that rows of weights must be a multiple of, for the engine that copies tiles of them."""


class Tiling(NamedTuple):
    """Rows and inputs of a tile, its outputs (of each half, where there are two), warps, and steps loaded ahead."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def experts_pack(weight_EOI: Tensor) -> Tensor:
    """See :func:`dovetail.ops.reference.experts_pack`: rows of odd sizes are set apart."""
    inputs = weight_EOI.shape[2]
    multiple = ALIGNED // weight_EOI.element_size()
    if inputs % multiple == 0:
        return weight_EOI.contiguous()
    padded = weight_EOI.new_empty((*weight_EOI.shape[:2], triton.cdiv(inputs, multiple) * multiple))
    padded[..., :inputs] = weight_EOI
    return padded[..., :inputs]


def moe_experts(
    x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, expert_ids_TA: Tensor, expert_weights_TA: Tensor
) -> Tensor:
    """See :func:`dovetail.ops.reference.moe_experts`."""
    tokens, choices = expert_ids_TA.shape
    if x_TD.stride(1) != 1:
        x_TD = x_TD.contiguous()
    if not tokens:
        return torch.empty_like(x_TD)
    if tokens <= FEW:
        return experts_of_few(x_TD, gate_up_EFD, down_EDF, expert_ids_TA, expert_weights_TA)
    inner_tiling, outer_tiling = tilings(tokens * choices / len(down_EDF), wide=x_TD.element_size() == 4)
    order = order_by_expert(expert_ids_TA, len(down_EDF), inner_tiling.rows)
    hidden_CF = inner_products(x_TD, gate_up_EFD, order, choices, inner_tiling)
    y_CD = outer_products(hidden_CF, down_EDF, expert_weights_TA, order, outer_tiling)
    return combine(y_CD, expert_ids_TA, len(down_EDF))


def tilings(rows: float, *, wide: bool) -> tuple[Tiling, Tiling]:
    """What measured best for so many rows per expert; the same rows in both products."""
    if wide:
        return Tiling(16, 16, 32, 4, 3), Tiling(16, 32, 32, 4, 3)
    if rows <= 8:
        return Tiling(16, 32, 256, 8, 2), Tiling(16, 64, 256, 4, 2)
    if rows <= 48:
        return Tiling(64, 64, 128, 4, 3), Tiling(64, 128, 64, 4, 4)
    return Tiling(128, 128, 64, 8, 4), Tiling(128, 256, 64, 8, 4)


def inner_products(x_TD: Tensor, weight_EFD: Tensor, order: Order, choices: int, tiling: Tiling) -> Tensor:
    """``silu(gate) × up`` of each row: ``[C, F]``, sorted."""
    experts, outputs, width = weight_EFD.shape
    inner = outputs // 2
    halves = weight_EFD.view(2 * experts, inner, width)
    out_CF = torch.empty((len(order.choices_C), inner), dtype=x_TD.dtype, device=x_TD.device)
    _inner_kernel[(triton.cdiv(inner, tiling.columns), order.tiles_3N.shape[1])](
        x_TD,
        TensorDescriptor(halves, halves.shape, halves.stride(), [2, tiling.columns, tiling.depth]),
        out_CF,
        *order,
        order.tiles_3N.shape[1],
        inner,
        width,
        x_TD.stride(0),
        CHOICES=choices,
        **_constants(x_TD, width, tiling),
    )
    return out_CF


def outer_products(x_CF: Tensor, weight_EDF: Tensor, factors_TA: Tensor, order: Order, tiling: Tiling) -> Tensor:
    """Each row's product, times its factor, back at the place of its choice: ``[C, D]``."""
    experts, width, inner = weight_EDF.shape
    weight = weight_EDF.view(experts * width, inner)
    out_CD = torch.empty((len(x_CF), width), dtype=x_CF.dtype, device=x_CF.device)
    _outer_kernel[(triton.cdiv(width, tiling.columns), order.tiles_3N.shape[1])](
        x_CF,
        TensorDescriptor(weight, weight.shape, weight.stride(), [tiling.columns, tiling.depth]),
        out_CD,
        factors_TA,
        *order,
        order.tiles_3N.shape[1],
        inner,
        width,
        *factors_TA.stride(),
        CHOICES=factors_TA.shape[1],
        **_constants(x_CF, inner, tiling),
    )
    return out_CD


def combine(y_CD: Tensor, expert_ids_TA: Tensor, experts: int) -> Tensor:
    """The sum of each token's choices, in their order: ``[T, D]``."""
    tokens, choices = expert_ids_TA.shape
    width = y_CD.shape[1]
    out_TD = torch.empty((tokens, width), dtype=y_CD.dtype, device=y_CD.device)
    block = min(1024, triton.next_power_of_2(width))
    _combine_kernel[(tokens, triton.cdiv(width, block))](
        y_CD,
        expert_ids_TA,
        out_TD,
        width,
        experts,
        *expert_ids_TA.stride(),
        CHOICES=choices,
        BLOCK=block,
        num_warps=4,
        **overlapped(out_TD.device),
    )
    return out_TD


def _constants(x: Tensor, inputs: int, tiling: Tiling) -> dict[str, object]:
    return {
        "ROWS": tiling.rows,
        "COLUMNS": tiling.columns,
        "DEPTH": tiling.depth,
        "EVEN": inputs % tiling.depth == 0,
        "PRECISION": "ieee" if x.element_size() == 4 else "tf32",
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
        **overlapped(x.device),
    }


@triton.jit(do_not_specialize=["slots"])
def _inner_kernel(
    x_ptr: tl.tensor,
    weight: tl.tensor,
    out_ptr: tl.tensor,
    choices_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    slots: tl.tensor,
    inner: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    release(OVERLAP)
    wait(OVERLAP)
    expert, begin, end = _tile(tiles_ptr, slots, tl.program_id(1))
    if begin >= end:
        return
    column = tl.program_id(0) * COLUMNS
    if (ROWS > 64) & (end - begin <= ROWS // 2):  # a rest
        _inner_tile(
            x_ptr, weight, out_ptr, choices_ptr, expert, begin, end, column, inner, width, x_stride,
            CHOICES, ROWS // 2 if ROWS > 64 else ROWS, COLUMNS, DEPTH, EVEN, PRECISION,
        )  # fmt: skip
    else:
        _inner_tile(
            x_ptr, weight, out_ptr, choices_ptr, expert, begin, end, column, inner, width, x_stride,
            CHOICES, ROWS, COLUMNS, DEPTH, EVEN, PRECISION,
        )  # fmt: skip


@triton.jit
def _tile(tiles_ptr: tl.tensor, slots: tl.tensor, tile: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    return tl.load(tiles_ptr + tile), tl.load(tiles_ptr + slots + tile), tl.load(tiles_ptr + 2 * slots + tile)


@triton.jit
def _inner_tile(
    x_ptr: tl.tensor,
    weight: tl.tensor,
    out_ptr: tl.tensor,
    choices_ptr: tl.tensor,
    expert: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    column: tl.tensor,
    inner: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    rows = begin + tl.arange(0, ROWS)
    row_mask = rows < end
    tokens = tl.load(choices_ptr + rows, mask=row_mask, other=0) // CHOICES
    k = tl.arange(0, DEPTH)
    x_places = x_ptr + tokens.to(tl.int64)[:, None] * x_stride + k[None, :]
    acc = tl.zeros([ROWS, 2 * COLUMNS], dtype=tl.float32)
    for at in range(0, width, DEPTH):
        x = tl.load(x_places) if EVEN else tl.load(x_places, mask=(at + k < width)[None, :], other=0.0)
        both = weight.load([2 * expert, column, at]).reshape(2 * COLUMNS, DEPTH)
        acc = tl.dot(x, both.T, acc, input_precision=PRECISION)
        x_places += DEPTH
    gate, up = acc.reshape(ROWS, 2, COLUMNS).permute(0, 2, 1).split()
    out = gate / (1.0 + tl.exp(-gate)) * up
    columns = column + tl.arange(0, COLUMNS)
    places = out_ptr + rows.to(tl.int64)[:, None] * inner + columns[None, :]
    tl.store(places, out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & (columns < inner)[None, :])


@triton.jit(do_not_specialize=["slots"])
def _outer_kernel(
    x_ptr: tl.tensor,
    weight: tl.tensor,
    out_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    choices_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    slots: tl.tensor,
    inner: tl.tensor,
    width: tl.tensor,
    factors_stride_t: tl.tensor,
    factors_stride_a: tl.tensor,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    release(OVERLAP)
    wait(OVERLAP)
    expert, begin, end = _tile(tiles_ptr, slots, tl.program_id(1))
    if begin >= end:
        return
    column = tl.program_id(0) * COLUMNS
    if (ROWS > 64) & (end - begin <= ROWS // 2):  # a rest
        _outer_tile(
            x_ptr, weight, out_ptr, factors_ptr, choices_ptr, expert, begin, end, column, inner, width,
            factors_stride_t, factors_stride_a,
            CHOICES, ROWS // 2 if ROWS > 64 else ROWS, COLUMNS, DEPTH, EVEN, PRECISION,
        )  # fmt: skip
    else:
        _outer_tile(
            x_ptr, weight, out_ptr, factors_ptr, choices_ptr, expert, begin, end, column, inner, width,
            factors_stride_t, factors_stride_a, CHOICES, ROWS, COLUMNS, DEPTH, EVEN, PRECISION,
        )  # fmt: skip


@triton.jit
def _outer_tile(
    x_ptr: tl.tensor,
    weight: tl.tensor,
    out_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    choices_ptr: tl.tensor,
    expert: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    column: tl.tensor,
    inner: tl.tensor,
    width: tl.tensor,
    factors_stride_t: tl.tensor,
    factors_stride_a: tl.tensor,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    rows = begin + tl.arange(0, ROWS)
    row_mask = rows < end
    choices = tl.load(choices_ptr + rows, mask=row_mask, other=0)  # early: nothing else covers the time it takes
    factor_places = factors_ptr + (choices // CHOICES) * factors_stride_t + (choices % CHOICES) * factors_stride_a
    factors = tl.load(factor_places, mask=row_mask, other=0.0).to(tl.float32)
    k = tl.arange(0, DEPTH)
    x_places = x_ptr + tl.where(row_mask, rows, begin).to(tl.int64)[:, None] * inner + k[None, :]
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for at in range(0, inner, DEPTH):
        x = tl.load(x_places) if EVEN else tl.load(x_places, mask=(at + k < inner)[None, :], other=0.0)
        acc = tl.dot(x, weight.load([expert * width + column, at]).T, acc, input_precision=PRECISION)
        x_places += DEPTH
    out = acc * factors[:, None]
    columns = column + tl.arange(0, COLUMNS)
    out_places = out_ptr + choices.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(out_places, out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & (columns < width)[None, :])


@triton.jit
def _combine_kernel(
    y_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    out_ptr: tl.tensor,
    width: tl.tensor,
    experts: tl.tensor,
    ids_stride_t: tl.tensor,
    ids_stride_a: tl.tensor,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    release(OVERLAP)
    wait(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for choice in tl.static_range(CHOICES):
        expert = tl.load(ids_ptr + token * ids_stride_t + choice * ids_stride_a)
        end = tl.where((expert >= 0) & (expert < experts), width, 0)  # nobody computed other rows
        places = y_ptr + (token * CHOICES + choice) * width + columns
        total += tl.load(places, mask=columns < end, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + columns, total.to(out_ptr.dtype.element_ty), mask=columns < width)
