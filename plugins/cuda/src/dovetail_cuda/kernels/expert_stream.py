"""Products of experts with a few rows each on Hopper, which are bound by the weights' bytes.

A program walks through tiles, and the copy engine keeps the next steps under way, of the next tile where this one ends.
The tensor cores take weights as the rows of a product, 64 of them, and experts' rows as its columns, of which they can
take few. Those have been sorted, so that the engine reads them as a matrix, too.

Programs begin while the kernel before still runs, and ask for their first weights then. Those of the outer product can
read which, as their kernel begins once all programs of the inner one know the tiles. Those of the inner product guess
that every expert has one tile, and ask again where they were wrong.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dovetail_cuda.kernels.expert_order import Order
from dovetail_cuda.kernels.overlap import overlapped, release, wait
from dovetail_cuda.kernels.prompts import copy
from dovetail_cuda.kernels.skinny import barrier
from dovetail_cuda.kernels.stream_support import STEP, Stream

HALF: gl.constexpr = gl.constexpr(64)
"""Rows of a weight that are multiplied together; a tile has two times as many."""


def inner_products(x_CD: Tensor, weight_EFD: Tensor, order: Order, stream: Stream) -> Tensor:
    """``silu(gate) × up`` of sorted rows: ``[C, F]``."""
    inner = weight_EFD.shape[1] // 2
    out_CF = torch.empty((len(x_CD), inner), dtype=x_CD.dtype, device=x_CD.device)
    weights = weight_EFD.view(-1, weight_EFD.shape[2])
    _inner_kernel[(stream.programs,)](
        *_descriptors(x_CD, weights, stream),
        out_CF,
        order.tiles_3N,
        order.tiles_3N.shape[1],
        inner,
        triton.cdiv(inner, HALF.value),
        triton.cdiv(weights.shape[1], STEP),
        STAGES=stream.stages,
        GUESSES=stream.guesses,
        num_warps=4,
        **overlapped(x_CD.device),
    )
    return out_CF


def outer_products(x_CF: Tensor, weight_EDF: Tensor, factors_TA: Tensor, order: Order, stream: Stream) -> Tensor:
    """Each row's product, times its factor, back at the place of its choice: ``[C, D]``.

    What made the weights and the order must have been waited for by the kernel before: :func:`inner_products`.
    """
    width = weight_EDF.shape[1]
    out_CD = torch.empty((len(x_CF), width), dtype=x_CF.dtype, device=x_CF.device)
    weights = weight_EDF.view(-1, weight_EDF.shape[2])
    _outer_kernel[(stream.programs,)](
        *_descriptors(x_CF, weights, stream),
        out_CD,
        factors_TA,
        *order,
        order.tiles_3N.shape[1],
        width,
        triton.cdiv(width, 2 * HALF.value),
        triton.cdiv(weights.shape[1], STEP),
        *factors_TA.stride(),
        CHOICES=factors_TA.shape[1],
        STAGES=stream.stages,
        num_warps=4,
        **overlapped(x_CF.device),
    )
    return out_CD


def _descriptors(x: Tensor, weights: Tensor, stream: Stream) -> tuple[TensorDescriptor, TensorDescriptor]:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return tuple(
        TensorDescriptor(matrix, [*matrix.shape], [*matrix.stride()], [rows, STEP], layout)
        for matrix, rows in ((x, stream.rows), (weights, HALF.value))
    )


@gluon.jit(do_not_specialize=["slots"])
def _inner_kernel(
    inputs: tma.tensor_descriptor,
    weights: tma.tensor_descriptor,
    out_ptr: gl.tensor,
    tiles_ptr: gl.tensor,
    slots: gl.tensor,
    outputs: gl.tensor,
    columns: gl.tensor,
    steps: gl.tensor,
    STAGES: gl.constexpr,
    GUESSES: gl.constexpr,
    OVERLAP: gl.constexpr,
) -> None:
    x, w, full = _ring(inputs, weights, STAGES)
    SUMS: gl.constexpr = _sums(inputs)
    row = gl.arange(0, inputs.block_type.shape[0], layout=gl.SliceLayout(0, SUMS))
    tile = gl.program_id(0)
    guess, guess_second = _halves(tile // columns, tile % columns, outputs, True)
    for i in gl.static_range(STAGES):
        _ask_weights(inputs, weights, w, full, i, guess, guess_second, i, GUESSES)
    wait(OVERLAP)
    release(OVERLAP)  # not earlier: the next kernel relies on it to know the tiles
    expert, begin, end = tile_at(tiles_ptr, slots, tile // columns)
    first, second = _halves(expert, tile % columns, outputs, True)
    asked = 0
    if GUESSES:
        for i in gl.static_range(STAGES):
            _ask_inputs(inputs, x, full, i, begin, i, True)
        if (first != guess) | (begin >= end):  # wrong: let it come, and go on behind it
            for i in gl.static_range(STAGES):
                mbarrier.wait(full.index(i), 0)
            barrier()
            asked = STAGES
    if (asked > 0) | (not GUESSES):
        for i in gl.static_range(STAGES):
            _ask_weights(inputs, weights, w, full, i, first, second, i, begin < end)
            _ask_inputs(inputs, x, full, i, begin, i, begin < end)
    while begin < end:
        next_tile = tile + gl.num_programs(0)
        next_expert, next_begin, next_end = tile_at(tiles_ptr, slots, next_tile // columns)
        next_first, next_second = _halves(next_expert, next_tile % columns, outputs, True)
        gate, up, asked = _products(
            inputs, weights, x, w, full, asked, steps, begin, first, second,
            next_begin, next_first, next_second, next_begin < next_end, STAGES, SUMS,
        )  # fmt: skip
        out = gate / (1.0 + gl.exp(-gate)) * up
        _store(out_ptr, out, begin + row, begin + row < end, (tile % columns) * HALF, outputs, SUMS)
        tile, begin, end, first, second = next_tile, next_begin, next_end, next_first, next_second


@gluon.jit(do_not_specialize=["slots"])
def _outer_kernel(
    inputs: tma.tensor_descriptor,
    weights: tma.tensor_descriptor,
    out_ptr: gl.tensor,
    factors_ptr: gl.tensor,
    choices_ptr: gl.tensor,
    tiles_ptr: gl.tensor,
    slots: gl.tensor,
    outputs: gl.tensor,
    columns: gl.tensor,
    steps: gl.tensor,
    factors_stride_t: gl.tensor,
    factors_stride_a: gl.tensor,
    CHOICES: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
) -> None:
    release(OVERLAP)
    x, w, full = _ring(inputs, weights, STAGES)
    SUMS: gl.constexpr = _sums(inputs)
    row = gl.arange(0, inputs.block_type.shape[0], layout=gl.SliceLayout(0, SUMS))
    tile = gl.program_id(0)
    expert, begin, end = tile_at(tiles_ptr, slots, tile // columns)
    first, second = _halves(expert, tile % columns, outputs, False)
    for i in gl.static_range(STAGES):
        _ask_weights(inputs, weights, w, full, i, first, second, i, begin < end)
    wait(OVERLAP)
    for i in gl.static_range(STAGES):
        _ask_inputs(inputs, x, full, i, begin, i, begin < end)
    asked = 0
    while begin < end:
        next_tile = tile + gl.num_programs(0)
        next_expert, next_begin, next_end = tile_at(tiles_ptr, slots, next_tile // columns)
        next_first, next_second = _halves(next_expert, next_tile % columns, outputs, False)
        # early: nothing else would cover the time that these loads take
        choice = gl.load(choices_ptr + begin + row, mask=begin + row < end, other=0)
        place = (choice // CHOICES) * factors_stride_t + (choice % CHOICES) * factors_stride_a
        factor = gl.load(factors_ptr + place, mask=begin + row < end, other=0.0).to(gl.float32)
        upper, lower, asked = _products(
            inputs, weights, x, w, full, asked, steps, begin, first, second,
            next_begin, next_first, next_second, next_begin < next_end, STAGES, SUMS,
        )  # fmt: skip
        column = (tile % columns) * (2 * HALF)
        factors = gl.expand_dims(factor, 0)
        _store(out_ptr, upper * factors, choice, begin + row < end, column, outputs, SUMS)
        _store(out_ptr, lower * factors, choice, begin + row < end, column + HALF, outputs, SUMS)
        tile, begin, end, first, second = next_tile, next_begin, next_end, next_first, next_second


@gluon.constexpr_function
def _sums(inputs: tma.tensor_descriptor) -> gl.NVMMADistributedLayout:
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, inputs.block_type.shape[0], 16])


@gluon.jit
def _ring(
    inputs: tma.tensor_descriptor, weights: tma.tensor_descriptor, STAGES: gl.constexpr
) -> tuple[gl.shared_memory_descriptor, gl.shared_memory_descriptor, gl.shared_memory_descriptor]:
    """Shared memory of inputs and of both halves of weights, and what tells that a stage is filled."""
    ROWS: gl.constexpr = inputs.block_type.shape[0]
    STEP: gl.constexpr = inputs.block_type.shape[1]
    x = gl.allocate_shared_memory(inputs.dtype, [STAGES, ROWS, STEP], inputs.layout)
    w = gl.allocate_shared_memory(weights.dtype, [2 * STAGES, HALF, STEP], weights.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    barrier()
    return x, w, full


@gluon.jit
def _products(
    inputs: tma.tensor_descriptor,
    weights: tma.tensor_descriptor,
    x: gl.shared_memory_descriptor,
    w: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    asked: gl.tensor,
    steps: gl.tensor,
    begin: gl.tensor,
    first: gl.tensor,
    second: gl.tensor,
    next_begin: gl.tensor,
    next_first: gl.tensor,
    next_second: gl.tensor,
    next_exists: gl.tensor,
    STAGES: gl.constexpr,
    SUMS: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor, gl.tensor]:
    """A tile, whose first steps are under way; at its end, those of the next one are. Also the steps so far."""
    ROWS: gl.constexpr = inputs.block_type.shape[0]
    acc = gl.zeros([HALF, ROWS], gl.float32, SUMS)
    more = gl.zeros([HALF, ROWS], gl.float32, SUMS)
    for step in range(steps):
        stage = asked % STAGES
        mbarrier.wait(full.index(stage), (asked // STAGES) & 1)
        some = x.index(stage).permute((1, 0))
        acc_asked = warpgroup_mma(w.index(2 * stage), some, acc, is_async=True)
        more_asked = warpgroup_mma(w.index(2 * stage + 1), some, more, is_async=True)
        acc, more = warpgroup_mma_wait(0, [acc_asked, more_asked])
        barrier()  # every warp has read the stage
        own = step + STAGES < steps
        at = step + STAGES - gl.where(own, 0, steps)
        first_row, second_row = gl.where(own, first, next_first), gl.where(own, second, next_second)
        _ask_weights(inputs, weights, w, full, stage, first_row, second_row, at, own | next_exists)
        _ask_inputs(inputs, x, full, stage, gl.where(own, begin, next_begin), at, own | next_exists)
        asked += 1
    return acc, more, asked


@gluon.jit
def tile_at(tiles_ptr: gl.tensor, slots: gl.tensor, slot: gl.tensor) -> tuple[gl.tensor, gl.tensor, gl.tensor]:
    """Expert, first row, and end of its rows; no rows where there is no such tile."""
    exists = slot < slots  # past the cache that a kernel before may have filled
    expert = gl.load(tiles_ptr + slot, mask=exists, other=0, cache_modifier=".cg")
    begin = gl.load(tiles_ptr + slots + slot, mask=exists, other=0, cache_modifier=".cg")
    return expert, begin, gl.load(tiles_ptr + 2 * slots + slot, mask=exists, other=0, cache_modifier=".cg")


@gluon.jit
def _halves(
    expert: gl.tensor, column: gl.tensor, outputs: gl.tensor, GATED: gl.constexpr
) -> tuple[gl.tensor, gl.tensor]:
    """The first rows of a tile's halves: of gates and what they are multiplied with, or one after the other."""
    if GATED:
        first = expert * 2 * outputs + column * HALF
        second = first + outputs
    else:
        first = expert * outputs + column * (2 * HALF)
        second = first + HALF
    return first, second


@gluon.jit
def _ask_weights(
    inputs: tma.tensor_descriptor,
    weights: tma.tensor_descriptor,
    w: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    stage: gl.tensor,
    first: gl.tensor,
    second: gl.tensor,
    step: gl.tensor,
    exists: gl.tensor,
) -> None:
    """Have a stage filled with a step's weights, if there is one. Its inputs are expected there, too."""
    STEP: gl.constexpr = inputs.block_type.shape[1]
    SIZE: gl.constexpr = (2 * HALF + inputs.block_type.shape[0]) * STEP * 2
    mbarrier.expect(full.index(stage), SIZE, pred=exists)
    copy(weights, [first, step * STEP], full.index(stage), w.index(2 * stage), exists)
    copy(weights, [second, step * STEP], full.index(stage), w.index(2 * stage + 1), exists)


@gluon.jit
def _ask_inputs(
    inputs: tma.tensor_descriptor,
    x: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    stage: gl.tensor,
    begin: gl.tensor,
    step: gl.tensor,
    exists: gl.tensor,
) -> None:
    """What lies beyond the matrices comes as zeros, and rows of the next tile are not stored."""
    copy(inputs, [begin, step * inputs.block_type.shape[1]], full.index(stage), x.index(stage), exists)


@gluon.jit
def _store(
    out_ptr: gl.tensor,
    out: gl.tensor,
    row: gl.tensor,
    exists: gl.tensor,
    column: gl.tensor,
    outputs: gl.tensor,
    SUMS: gl.constexpr,
) -> None:
    columns = column + gl.arange(0, HALF, layout=gl.SliceLayout(1, SUMS))
    places = out_ptr + gl.expand_dims(row.to(gl.int64) * outputs, 0) + gl.expand_dims(columns, 1)
    mask = gl.expand_dims(exists, 0) & gl.expand_dims(columns < outputs, 1)
    gl.store(places, out.to(out_ptr.dtype.element_ty), mask=mask)
