"""The outer product of experts with many rows on Hopper: one warp copies tiles, two groups of four warps compute.

A tile has up to 192 rows of one expert, in parts of 64, and 256 outputs. Of two parts, each group has one; the third
one, or the only one, they share by halves of its outputs. Large tiles matter: what multiprocessors read from the cache
is what limits them. Programs stay on their multiprocessor and take tiles as they come to them, and the copying warp
runs ahead into the next one, while the results of the one before are stored.

C: choices of all tokens, in the order of their experts; others as in :mod:`dovetail.contracts`.
"""

from __future__ import annotations

import torch
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

from dovetail_cuda.kernels.counters import counters
from dovetail_cuda.kernels.expert_order import Order
from dovetail_cuda.kernels.expert_stream import tile_at
from dovetail_cuda.kernels.group_support import COLUMNS, DEPTH, ROWS
from dovetail_cuda.kernels.many_rows import described
from dovetail_cuda.kernels.narrow import multiprocessors
from dovetail_cuda.kernels.prompts import copy, seen_as
from dovetail_cuda.kernels.skinny import barrier

STAGES = 4
"""Steps that are copied ahead: what shared memory has room for."""
PART: gl.constexpr = gl.constexpr(ROWS)
"""Rows that a group of warps multiplies together."""
OUTPUTS: gl.constexpr = gl.constexpr(COLUMNS)
INPUTS: gl.constexpr = gl.constexpr(DEPTH)
AHEAD: gl.constexpr = gl.constexpr(3)
"""Tiles that a program takes before it comes to the first of them."""


def outer_products(x_CF: Tensor, weight_EDF: Tensor, factors_TA: Tensor, order: Order) -> Tensor:
    """Each row's product, times its factor, back at the place of its choice: ``[C, D]``.

    Args:
        order: of tiles of two parts, with up to one more at an expert's end.
    """
    experts, width, inner = weight_EDF.shape
    out_CD = torch.empty((len(x_CF), width), dtype=x_CF.dtype, device=x_CF.device)
    slots = order.tiles_3N.shape[1]
    _outer_kernel[(min(slots * (width // COLUMNS), multiprocessors(x_CF.device)),)](
        described(x_CF, ROWS, DEPTH),
        described(weight_EDF.view(experts * width, inner), COLUMNS, DEPTH),
        out_CD,
        factors_TA,
        *order,
        counters(x_CF.device, 2),
        slots,
        *factors_TA.stride(),
        CHOICES=factors_TA.shape[1],
        WIDTH=width,
        INNER=inner,
        STAGES=STAGES,
        num_warps=4,
    )
    return out_CD


@gluon.jit(do_not_specialize=["slots"])
def _outer_kernel(
    rows: tma.tensor_descriptor,
    weights: tma.tensor_descriptor,
    out_ptr: gl.tensor,
    factors_ptr: gl.tensor,
    choices_ptr: gl.tensor,
    tiles_ptr: gl.tensor,
    taken_ptr: gl.tensor,
    slots: gl.tensor,
    factors_stride_t: gl.tensor,
    factors_stride_a: gl.tensor,
    CHOICES: gl.constexpr,
    WIDTH: gl.constexpr,
    INNER: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
) -> None:
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    NOTE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    x = gl.allocate_shared_memory(rows.dtype, [3 * STAGES, PART, INPUTS], rows.layout)
    w = gl.allocate_shared_memory(weights.dtype, [STAGES, OUTPUTS, INPUTS], weights.layout)
    halves = seen_as(w, weights.dtype, [2 * STAGES, OUTPUTS // 2, INPUTS], weights.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    fence_async_shared()
    notes = gl.allocate_shared_memory(gl.int32, [2, 2], NOTE)  # of this tile and the next: its rows and first output
    choices = gl.allocate_shared_memory(gl.int32, [2 * 3, PART], NOTE)
    memory = (x, w, halves, full, free, notes, choices)
    factors = (factors_ptr, factors_stride_t, factors_stride_a)
    gl.warp_specialize(
        [
            (_compute, (memory, factors, out_ptr, 0, CHOICES, WIDTH, INNER, STAGES)),
            (_compute, (memory, factors, out_ptr, 1, CHOICES, WIDTH, INNER, STAGES)),
            (_fetch, (memory, rows, weights, choices_ptr, tiles_ptr, taken_ptr, slots, WIDTH, INNER, STAGES)),
        ],
        [4, 1],
        [232, 40],
    )


@gluon.jit
def _fetch(
    memory: gl.tuple,
    rows: tma.tensor_descriptor,
    weights: tma.tensor_descriptor,
    choices_ptr: gl.tensor,
    tiles_ptr: gl.tensor,
    taken_ptr: gl.tensor,
    slots: gl.tensor,
    WIDTH: gl.constexpr,
    INNER: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """The copying warp. It asks what tiles are early: nothing else would cover the time that it takes to know."""
    BLOCKS: gl.constexpr = WIDTH // OUTPUTS
    x, w, _, full, free, notes, choices = memory
    count = 0
    turn = 0
    work, next_work = gl.program_id(0), gl.program_id(0) + gl.num_programs(0)
    work_after = next_work + gl.num_programs(0)
    expert, begin, end = tile_at(tiles_ptr, slots, work // BLOCKS)
    next_expert, next_begin, next_end = tile_at(tiles_ptr, slots, next_work // BLOCKS)
    first, second, third = _choices(choices_ptr, begin, end)
    while begin < end:
        taken = AHEAD * gl.num_programs(0) + gl.atomic_add(taken_ptr, 1, sem="relaxed")
        expert_after, begin_after, end_after = tile_at(tiles_ptr, slots, work_after // BLOCKS)
        next_first, next_second, next_third = _choices(choices_ptr, next_begin, next_end)
        size = gl.where(end - begin > 3 * PART, 2 * PART, end - begin)
        column = work % BLOCKS * OUTPUTS
        mbarrier.wait(free.index(count % STAGES), ((count // STAGES) & 1) ^ 1)
        place = turn % 2 * 3
        choices.index(place).store(first)
        choices.index(place + 1).store(second)
        choices.index(place + 2).store(third)
        _write_note(notes, turn, size, column)
        for at in range(0, INNER, INPUTS):
            stage = count % STAGES
            mbarrier.wait(free.index(stage), ((count // STAGES) & 1) ^ 1)
            _copy_step(x, w, full, rows, weights, stage, begin, expert * WIDTH + column, at, size)
            count += 1
        turn += 1
        work, next_work, work_after = next_work, work_after, taken
        expert, begin, end = next_expert, next_begin, next_end
        next_expert, next_begin, next_end = expert_after, begin_after, end_after
        first, second, third = next_first, next_second, next_third
    mbarrier.wait(free.index(count % STAGES), ((count // STAGES) & 1) ^ 1)
    _write_note(notes, turn, count * 0, count * 0)
    mbarrier.arrive(full.index(count % STAGES), count=1)
    _leave(taken_ptr)


@gluon.jit
def _leave(taken_ptr: gl.tensor) -> None:
    """The last program leaves the counters as the first one found them."""
    if gl.atomic_add(taken_ptr + 1, 1) == gl.num_programs(0) - 1:
        gl.store(taken_ptr, 0)
        gl.store(taken_ptr + 1, 0)


@gluon.jit
def _choices(choices_ptr: gl.tensor, begin: gl.tensor, end: gl.tensor) -> tuple[gl.tensor, gl.tensor, gl.tensor]:
    """Of each part's rows; any where there are no more rows."""
    row = begin + gl.arange(0, PART, layout=gl.BlockedLayout([2], [32], [1], [0]))
    first = gl.load(choices_ptr + row, mask=row < end, other=0)
    second = gl.load(choices_ptr + row + PART, mask=row + PART < end, other=0)
    return first, second, gl.load(choices_ptr + row + 2 * PART, mask=row + 2 * PART < end, other=0)


@gluon.jit
def _write_note(notes: gl.shared_memory_descriptor, turn: gl.tensor, size: gl.tensor, column: gl.tensor) -> None:
    """Tell those who compute what the tile is. They read it once its first step is there."""
    field = gl.arange(0, 2, layout=gl.BlockedLayout([2], [32], [1], [0]))
    notes.index(turn % 2).store(gl.where(field == 0, size, column // OUTPUTS))
    barrier()


@gluon.jit
def _copy_step(
    x: gl.shared_memory_descriptor,
    w: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    rows: tma.tensor_descriptor,
    weights: tma.tensor_descriptor,
    stage: gl.tensor,
    begin: gl.tensor,
    output: gl.tensor,
    at: gl.tensor,
    size: gl.tensor,
) -> None:
    """A step's inputs of the outputs and of all parts. Rows of the next tile may be among them, and are not stored."""
    bar = full.index(stage)
    mbarrier.expect(bar, 2 * INPUTS * (OUTPUTS + PART), pred=size <= PART)
    mbarrier.expect(bar, 2 * INPUTS * (OUTPUTS + 2 * PART), pred=(size > PART) & (size <= 2 * PART))
    mbarrier.expect(bar, 2 * INPUTS * (OUTPUTS + 3 * PART), pred=size > 2 * PART)
    copy(weights, [output, at], bar, w.index(stage))
    for part in gl.static_range(3):
        copy(rows, [begin + part * PART, at], bar, x.index(3 * stage + part), pred=size > part * PART)


@gluon.jit
def _compute(
    memory: gl.tuple,
    factors: gl.tuple,
    out_ptr: gl.tensor,
    GROUP: gl.constexpr,
    CHOICES: gl.constexpr,
    WIDTH: gl.constexpr,
    INNER: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """Four warps, which compute a part of their own, and half of a shared one."""
    count = 0
    turn = 0
    size, block = _read_note(memory, count, turn, STAGES)
    while size > 0:
        column = block * OUTPUTS
        if size > 2 * PART:
            _compute_tile(
                memory, factors, out_ptr, count, turn, size, column, GROUP, True, True, CHOICES, WIDTH, INNER, STAGES
            )
        elif size > PART:
            _compute_tile(
                memory, factors, out_ptr, count, turn, size, column, GROUP, True, False, CHOICES, WIDTH, INNER, STAGES
            )
        else:
            _compute_tile(
                memory, factors, out_ptr, count, turn, size, column, GROUP, False, True, CHOICES, WIDTH, INNER, STAGES
            )
        count += INNER // INPUTS
        turn += 1
        size, block = _read_note(memory, count, turn, STAGES)


@gluon.jit
def _read_note(
    memory: gl.tuple, count: gl.tensor, turn: gl.tensor, STAGES: gl.constexpr
) -> tuple[gl.tensor, gl.tensor]:
    """A tile's rows, of which the last one has none, and the block of its outputs."""
    NOTE: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    _, _, _, full, _, notes, _ = memory
    mbarrier.wait(full.index(count % STAGES), (count // STAGES) & 1)
    note = notes.index(turn % 2).load(NOTE)
    field = gl.arange(0, 2, layout=NOTE)
    return gl.sum(gl.where(field == 0, note, 0), 0), gl.sum(gl.where(field == 1, note, 0), 0)


@gluon.jit
def _compute_tile(
    memory: gl.tuple,
    factors: gl.tuple,
    out_ptr: gl.tensor,
    count: gl.tensor,
    turn: gl.tensor,
    size: gl.tensor,
    column: gl.tensor,
    GROUP: gl.constexpr,
    OWN: gl.constexpr,
    SHARED: gl.constexpr,
    CHOICES: gl.constexpr,
    WIDTH: gl.constexpr,
    INNER: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """``OWN``, ``SHARED``: whether the tile has such parts."""
    LAST: gl.constexpr = 2 if OWN else 0
    _, _, _, _, _, _, choices = memory
    own_choices, shared_choices = choices.index(turn % 2 * 3 + GROUP), choices.index(turn % 2 * 3 + LAST)
    # early: nothing else would cover the time that these loads take
    if OWN:
        own_factors = _factors(own_choices, factors, CHOICES, _sums(OUTPUTS))
    if SHARED:
        shared_factors = _factors(shared_choices, factors, CHOICES, _sums(OUTPUTS // 2))
    own, shared = _products(memory, count, GROUP, OWN, SHARED, INNER // INPUTS, STAGES)
    if OWN:
        own = own * gl.expand_dims(own_factors, 1)
        _store(out_ptr, own, own_choices, size - GROUP * PART, column, WIDTH)
    if SHARED:
        shared = shared * gl.expand_dims(shared_factors, 1)
        _store(out_ptr, shared, shared_choices, size - LAST * PART, column + GROUP * (OUTPUTS // 2), WIDTH)


@gluon.constexpr_function
def _sums(columns: int) -> gl.NVMMADistributedLayout:
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def _factors(
    choices: gl.shared_memory_descriptor, factors: gl.tuple, CHOICES: gl.constexpr, SUMS: gl.constexpr
) -> gl.tensor:
    factors_ptr, stride_t, stride_a = factors
    choice = choices.load(gl.SliceLayout(1, SUMS))
    return gl.load(factors_ptr + choice // CHOICES * stride_t + choice % CHOICES * stride_a).to(gl.float32)


@gluon.jit
def _products(
    memory: gl.tuple,
    count: gl.tensor,
    GROUP: gl.constexpr,
    OWN: gl.constexpr,
    SHARED: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor]:
    """Of the own part and of half of the shared one. A step is asked for while the one before is computed."""
    x, w, halves, full, free, _, _ = memory
    own = gl.zeros([PART, OUTPUTS], gl.float32, _sums(OUTPUTS))
    shared = gl.zeros([PART, OUTPUTS // 2], gl.float32, _sums(OUTPUTS // 2))
    for step in range(STEPS):
        stage = (count + step) % STAGES
        mbarrier.wait(full.index(stage), ((count + step) // STAGES) & 1)
        if OWN:
            weights = w.index(stage).permute((1, 0))
            own = warpgroup_mma(x.index(3 * stage + GROUP), weights, own, use_acc=step > 0, is_async=True)
        if SHARED:
            part = x.index(3 * stage + (2 if OWN else 0))
            weights = halves.index(2 * stage + GROUP).permute((1, 0))
            shared = warpgroup_mma(part, weights, shared, use_acc=step > 0, is_async=True)
        own, shared = _await(own, shared, OWN, SHARED, 1)
        mbarrier.arrive(free.index((count + step + STAGES - 1) % STAGES), count=1, pred=step > 0)
    own, shared = _await(own, shared, OWN, SHARED, 0)
    mbarrier.arrive(free.index((count + STEPS - 1) % STAGES), count=1)
    return own, shared


@gluon.jit
def _await(
    own: gl.tensor, shared: gl.tensor, OWN: gl.constexpr, SHARED: gl.constexpr, STEPS: gl.constexpr
) -> tuple[gl.tensor, gl.tensor]:
    """Until no more than so many steps are under way."""
    if OWN and SHARED:
        own, shared = warpgroup_mma_wait(2 * STEPS, [own, shared])
    elif OWN:
        own = warpgroup_mma_wait(STEPS, [own])
    else:
        shared = warpgroup_mma_wait(STEPS, [shared])
    return own, shared


@gluon.jit
def _store(
    out_ptr: gl.tensor,
    out: gl.tensor,
    choices: gl.shared_memory_descriptor,
    size: gl.tensor,
    column: gl.tensor,
    WIDTH: gl.constexpr,
) -> None:
    """Rows of a part to the places of their choices, so far as the expert has them."""
    SIZE: gl.constexpr = out.shape[1]
    STORED: gl.constexpr = _turned(SIZE, 2)
    choice = choices.load(gl.SliceLayout(1, STORED))
    row = gl.arange(0, PART, layout=gl.SliceLayout(1, STORED))
    columns = column + gl.arange(0, SIZE, layout=gl.SliceLayout(0, STORED))
    places = out_ptr + gl.expand_dims(choice.to(gl.int64) * WIDTH, 1) + gl.expand_dims(columns, 0)
    half = gl.convert_layout(out.to(out_ptr.dtype.element_ty), _turned(SIZE, 1))
    # keeps the compiler from doing both turns at once, for which it would take shared memory
    half = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [half], half.dtype, True, 2)
    gl.store(places, gl.convert_layout(half, STORED), mask=gl.expand_dims(row < size, 1))


@gluon.constexpr_function
def _turned(columns: int, turns: int) -> gl.DistributedLinearLayout:
    """How products lie after so many of two exchanges among four lanes, which give each eight neighbours of a row."""
    lanes = [[0, 8], [0, 16] if turns == 2 else [0, 4], [1, 0], [2, 0], [4, 0]]
    registers = [[0, 1], [0, 2], [0, 4] if turns == 2 else [0, 16], [8, 0]]
    registers += [[0, 1 << i] for i in range(5, columns.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [ROWS, columns])
