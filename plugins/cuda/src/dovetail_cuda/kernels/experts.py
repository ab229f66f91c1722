"""Mixtures of experts: tokens sorted by expert, two grouped products, and the weighted sum of each token's choices.

C: choices of all tokens, in the order of their experts where sorted; O, I: outputs and inputs of a product; others as
in :mod:`dovetail.contracts`.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from dovetail_cuda.kernels.expert_order import Order, order_by_expert, sort_by_expert
from dovetail_cuda.kernels.expert_vectors import experts_of_few
from dovetail_cuda.kernels.group_support import takes_groups
from dovetail_cuda.kernels.overlap import overlapped, release, wait
from dovetail_cuda.kernels.stream_support import Stream, stream

FEW = 4
"""Tokens up to which each choice reads its expert's weights for itself."""
ALIGNED = 16
"""Bytes that rows must be a multiple of, for the engine that copies tiles of them."""
LARGEST = 4 * 64 * (128 + 64 + 256) * 2
"""Bytes of shared memory that the largest tiles take."""


class Tiling(NamedTuple):
    """Of a program.

    Attributes:
        rows, columns, depth: of a tile: rows, outputs (of each half, where there are two), and inputs of a step.
        warps: of a program.
        stages: steps that are loaded ahead.
        rest: rows at an expert's end that take no tile of their own: the tile before computes them, too, with the
            same weights, and an expert of no more has a tile of this height.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    rest: int = 0


def experts_pack(weight_EOI: Tensor) -> Tensor:
    """See :func:`dovetail.ops.reference.experts_pack`: rows of odd sizes are set apart."""
    inputs, multiple = weight_EOI.shape[2], _multiple(weight_EOI)
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
    if how := stream(x_TD, gate_up_EFD, down_EDF, expert_ids_TA):
        y_CD = _streamed(x_TD, gate_up_EFD, down_EDF, expert_ids_TA, expert_weights_TA, how)
        return combine(y_CD, expert_ids_TA, len(down_EDF))
    inner_tiling, outer_tiling = tilings(tokens * choices / len(down_EDF), x_TD)
    order = order_by_expert(expert_ids_TA, len(down_EDF), inner_tiling.rows, inner_tiling.rest)
    hidden_CF = inner_products(x_TD, gate_up_EFD, order, choices, inner_tiling)
    if takes_groups(hidden_CF, down_EDF, outer_tiling.rows, outer_tiling.rest):
        y_CD = _grouped(hidden_CF, down_EDF, expert_weights_TA, order)
    else:
        y_CD = outer_products(hidden_CF, down_EDF, expert_weights_TA, order, outer_tiling)
    return combine(y_CD, expert_ids_TA, len(down_EDF))


def _grouped(hidden_CF: Tensor, down_EDF: Tensor, expert_weights_TA: Tensor, order: Order) -> Tensor:
    from dovetail_cuda.kernels import expert_groups  # not every release of Triton can

    return expert_groups.outer_products(hidden_CF, down_EDF, expert_weights_TA, order)


def _streamed(
    x_TD: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    expert_ids_TA: Tensor,
    expert_weights_TA: Tensor,
    how: Stream,
) -> Tensor:
    from dovetail_cuda.kernels import expert_stream  # not every release of Triton can

    order, x_CD = sort_by_expert(x_TD, expert_ids_TA, len(down_EDF), how.rows)
    hidden_CF = expert_stream.inner_products(x_CD, gate_up_EFD, order, how)
    return expert_stream.outer_products(hidden_CF, down_EDF, expert_weights_TA, order, how)


def tilings(rows: float, x: Tensor) -> tuple[Tiling, Tiling]:
    """What measured best for so many rows per expert; the same rows and rest in both products."""
    if x.element_size() == 4:
        return Tiling(16, 16, 32, 4, 3), Tiling(16, 32, 32, 4, 3)
    if rows <= 8:
        return Tiling(16, 32, 256, 8, 2), Tiling(16, 64, 256, 4, 2)
    if not _has_room(x.device):
        return Tiling(64, 64, 64, 4, 3), Tiling(64, 128, 64, 4, 3)
    if rows <= 48:
        return Tiling(64, 64, 128, 4, 3), Tiling(64, 128, 64, 4, 4)
    return Tiling(128, 128, 64, 8, 4, rest=64), Tiling(128, 256, 64, 8, 4, rest=64)


@cache
def _has_room(device: torch.device) -> bool:
    """Whether a program can have the largest tiles in shared memory."""
    if device.type != "cuda":
        return True
    index = torch.cuda.current_device() if device.index is None else device.index
    return bool(driver.active.utils.get_device_properties(index)["max_shared_mem"] >= LARGEST)


def inner_products(x_TD: Tensor, weight_EFD: Tensor, order: Order, choices: int, tiling: Tiling) -> Tensor:
    """``silu(gate) × up`` of each row: ``[C, F]``, sorted."""
    experts, outputs, width = weight_EFD.shape
    inner = outputs // 2
    halves = weight_EFD.view(2 * experts, inner, width)
    padded = triton.cdiv(inner, _multiple(x_TD)) * _multiple(x_TD)
    out_CF = torch.empty((len(order.choices_C), padded), dtype=x_TD.dtype, device=x_TD.device)[:, :inner]
    _inner_kernel[(triton.cdiv(inner, tiling.columns), order.tiles_3N.shape[1])](
        x_TD,
        TensorDescriptor(halves, halves.shape, halves.stride(), [2, tiling.columns, tiling.depth]),
        out_CF,
        *order,
        order.tiles_3N.shape[1],
        inner,
        width,
        x_TD.stride(0),
        out_CF.stride(0),
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
        TensorDescriptor(x_CF, x_CF.shape, x_CF.stride(), [tiling.rows, tiling.depth]),
        TensorDescriptor(x_CF, x_CF.shape, x_CF.stride(), [tiling.rest or tiling.rows, tiling.depth]),
        TensorDescriptor(weight, weight.shape, weight.stride(), [tiling.columns, tiling.depth]),
        out_CD,
        factors_TA,
        *order,
        order.tiles_3N.shape[1],
        inner,
        width,
        x_CF.stride(0),
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


def _multiple(x: Tensor) -> int:
    """Elements that rows must be a multiple of."""
    return ALIGNED // x.element_size()


def _constants(x: Tensor, inputs: int, tiling: Tiling) -> dict[str, object]:
    return {
        "ROWS": tiling.rows,
        "REST": tiling.rest,
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
    out_stride: tl.tensor,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    REST: tl.constexpr,
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
    if (REST > 0) & (end - begin > ROWS) & (end - begin <= ROWS + REST):
        _inner_tile(
            x_ptr, weight, out_ptr, choices_ptr, expert, begin, end, column, inner, width, x_stride, out_stride,
            CHOICES, ROWS, REST, COLUMNS, DEPTH, EVEN, PRECISION,
        )  # fmt: skip
    elif (REST == 0) | (end - begin > REST):
        _inner_tile(
            x_ptr, weight, out_ptr, choices_ptr, expert, begin, end, column, inner, width, x_stride, out_stride,
            CHOICES, ROWS, 0, COLUMNS, DEPTH, EVEN, PRECISION,
        )  # fmt: skip
    else:
        _inner_tile(
            x_ptr, weight, out_ptr, choices_ptr, expert, begin, end, column, inner, width, x_stride, out_stride,
            CHOICES, REST if REST > 0 else ROWS, 0, COLUMNS, DEPTH, EVEN, PRECISION,
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
    out_stride: tl.tensor,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    REST: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    k = tl.arange(0, DEPTH)
    rows = begin + tl.arange(0, ROWS)
    tokens = tl.load(choices_ptr + rows, mask=rows < end, other=0) // CHOICES
    x_places = x_ptr + tokens.to(tl.int64)[:, None] * x_stride + k[None, :]
    acc = tl.zeros([ROWS, 2 * COLUMNS], dtype=tl.float32)
    if REST > 0:
        more_rows = begin + ROWS + tl.arange(0, REST)
        more_tokens = tl.load(choices_ptr + more_rows, mask=more_rows < end, other=0) // CHOICES
        more_places = x_ptr + more_tokens.to(tl.int64)[:, None] * x_stride + k[None, :]
        more = tl.zeros([REST, 2 * COLUMNS], dtype=tl.float32)
    for at in range(0, width, DEPTH):
        both = weight.load([2 * expert, column, at]).reshape(2 * COLUMNS, DEPTH)
        x = _some(x_places, at, width, k, EVEN)
        acc = tl.dot(x, both.T, acc, input_precision=PRECISION)
        x_places += DEPTH
        if REST > 0:
            more = tl.dot(_some(more_places, at, width, k, EVEN), both.T, more, input_precision=PRECISION)
            more_places += DEPTH
    columns = column + tl.arange(0, COLUMNS)
    _store_gated(out_ptr, acc, rows, end, columns, inner, out_stride, ROWS, COLUMNS)
    if REST > 0:
        _store_gated(out_ptr, more, more_rows, end, columns, inner, out_stride, REST, COLUMNS)


@triton.jit
def _some(places: tl.tensor, at: tl.tensor, inputs: tl.tensor, k: tl.tensor, EVEN: tl.constexpr) -> tl.tensor:
    """Some inputs of each row, from the one at ``at`` on."""
    return tl.load(places) if EVEN else tl.load(places, mask=(at + k < inputs)[None, :], other=0.0)


@triton.jit
def _store_gated(
    out_ptr: tl.tensor,
    acc: tl.tensor,
    rows: tl.tensor,
    end: tl.tensor,
    columns: tl.tensor,
    inner: tl.tensor,
    out_stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    gate, up = acc.reshape(ROWS, 2, COLUMNS).permute(0, 2, 1).split()
    out = gate / (1.0 + tl.exp(-gate)) * up
    places = out_ptr + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    tl.store(places, out.to(out_ptr.dtype.element_ty), mask=(rows < end)[:, None] & (columns < inner)[None, :])


@triton.jit(do_not_specialize=["slots"])
def _outer_kernel(
    x_ptr: tl.tensor,
    x_tiles: tl.tensor,
    x_rests: tl.tensor,
    weight: tl.tensor,
    out_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    choices_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    slots: tl.tensor,
    inner: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    factors_stride_t: tl.tensor,
    factors_stride_a: tl.tensor,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    REST: tl.constexpr,
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
    if (REST > 0) & (end - begin > ROWS) & (end - begin <= ROWS + REST):
        _outer_tile(
            x_ptr, x_tiles, x_rests, weight, out_ptr, factors_ptr, choices_ptr, expert, begin, end, column, inner,
            width, x_stride, factors_stride_t, factors_stride_a,
            CHOICES, ROWS, REST, COLUMNS, DEPTH, EVEN, PRECISION, REST > 0,
        )  # fmt: skip
    elif (REST == 0) | (end - begin > REST):
        _outer_tile(
            x_ptr, x_tiles, x_rests, weight, out_ptr, factors_ptr, choices_ptr, expert, begin, end, column, inner,
            width, x_stride, factors_stride_t, factors_stride_a,
            CHOICES, ROWS, 0, COLUMNS, DEPTH, EVEN, PRECISION, REST > 0,
        )  # fmt: skip
    else:
        _outer_tile(
            x_ptr, x_rests, x_rests, weight, out_ptr, factors_ptr, choices_ptr, expert, begin, end, column, inner,
            width, x_stride, factors_stride_t, factors_stride_a,
            CHOICES, REST if REST > 0 else ROWS, 0, COLUMNS, DEPTH, EVEN, PRECISION, REST > 0,
        )  # fmt: skip


@triton.jit
def _outer_tile(
    x_ptr: tl.tensor,
    x_tiles: tl.tensor,
    x_rests: tl.tensor,
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
    x_stride: tl.tensor,
    factors_stride_t: tl.tensor,
    factors_stride_a: tl.tensor,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    REST: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    COPIED: tl.constexpr,
) -> None:
    """``COPIED``: whether rows are read as tiles, of this expert or the next; large ones gain by it."""
    k = tl.arange(0, DEPTH)
    rows = begin + tl.arange(0, ROWS)
    # early: nothing else would cover the time that these loads take
    choices = tl.load(choices_ptr + rows, mask=rows < end, other=0)
    factors = _factors(factors_ptr, choices, factors_stride_t, factors_stride_a, CHOICES)
    x_places = x_ptr + tl.where(rows < end, rows, begin).to(tl.int64)[:, None] * x_stride + k[None, :]
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    if REST > 0:
        more_rows = begin + ROWS + tl.arange(0, REST)
        more_choices = tl.load(choices_ptr + more_rows, mask=more_rows < end, other=0)
        more_factors = _factors(factors_ptr, more_choices, factors_stride_t, factors_stride_a, CHOICES)
        more = tl.zeros([REST, COLUMNS], dtype=tl.float32)
    for at in range(0, inner, DEPTH):
        some = weight.load([expert * width + column, at])
        x = x_tiles.load([begin, at]) if COPIED else _some(x_places, at, inner, k, EVEN)
        acc = tl.dot(x, some.T, acc, input_precision=PRECISION)
        x_places += DEPTH
        if REST > 0:
            more = tl.dot(x_rests.load([begin + ROWS, at]), some.T, more, input_precision=PRECISION)
    columns = column + tl.arange(0, COLUMNS)
    _store_scaled(out_ptr, acc * factors[:, None], choices, rows < end, columns, width)
    if REST > 0:
        _store_scaled(out_ptr, more * more_factors[:, None], more_choices, more_rows < end, columns, width)


@triton.jit
def _factors(
    factors_ptr: tl.tensor, choices: tl.tensor, stride_t: tl.tensor, stride_a: tl.tensor, CHOICES: tl.constexpr
) -> tl.tensor:
    return tl.load(factors_ptr + (choices // CHOICES) * stride_t + (choices % CHOICES) * stride_a).to(tl.float32)


@triton.jit
def _store_scaled(
    out_ptr: tl.tensor, out: tl.tensor, choices: tl.tensor, mask: tl.tensor, columns: tl.tensor, width: tl.tensor
) -> None:
    places = out_ptr + choices.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(places, out.to(out_ptr.dtype.element_ty), mask=mask[:, None] & (columns < width)[None, :])


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
