"""Attention of prompts on Hopper: one warp copies pages into shared memory, two groups of four warps compute.

The scheme is FlashAttention-3's (Shah et al. 2024, arXiv:2407.08608). A tile has 128 rows: queries of one request for
all query heads of a key/value head. Each group has 64 of them, and both read the same keys and values. The copy engine
takes pages as they lie in the cache, so a prompt's own keys are read like those before. Programs stay on their
multiprocessor and walk through the tiles, longest first. The copying warp runs ahead into the next one, whose first
scores are computed while the sums of the one before are stored.

Keys are walked from the last to the first: those that some rows must not see come first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import _unwrap_if_constexpr, builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dovetail_cuda.kernels.prompt_tiles import COLUMNS, KEYS, NUMBER

ROWS = 128
STAGES = 4
COPIED: gl.constexpr = gl.constexpr(64)
"""Elements of a row that the copy engine swizzles together; also the rows of a group of warps."""
FAR_AWAY: gl.constexpr = gl.constexpr(1 << 30)

copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # by release of Triton


@builtin
def seen_as(
    memory: gl.shared_memory_descriptor,
    dtype: gl.dtype,
    shape: Sequence[int],
    layout: gl.NVMMASharedLayout,
    _semantic: Any = None,
) -> gl.shared_memory_descriptor:
    """The same shared memory as an array of another shape. Triton has this under different names."""
    sizes = [_unwrap_if_constexpr(size) for size in shape]
    return _semantic.memdesc_reinterpret(memory, _unwrap_if_constexpr(dtype), sizes, _unwrap_if_constexpr(layout))


def attend_prompts(
    q_THK: Tensor,
    keys_BNPK: Tensor,
    values_BNPK: Tensor,
    block_table_RB: Tensor,
    tiles: Tensor,
    scale: float,
    processors: int,
) -> Tensor:
    """:func:`paged_attention` of the requests in ``tiles`` (see :func:`prompt_tiles`); others' rows are not set."""
    tokens, heads, size = q_THK.shape
    blocks, kv_heads, page, _ = keys_BNPK.shape
    group = heads // kv_heads
    out_TE = torch.empty((tokens, heads * size), dtype=q_THK.dtype, device=q_THK.device)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    queries = TensorDescriptor(
        q_THK, [tokens, heads, size], [*q_THK.stride()], [COPIED.value // group, group, COPIED.value], layout
    )
    keys, values = (
        TensorDescriptor(x, [blocks * kv_heads, page, size], [page * size, size, 1], [1, page, COPIED.value], layout)
        for x in (keys_BNPK, values_BNPK)
    )
    works = len(tiles) * kv_heads
    _prompt_kernel[(min(works, processors),)](
        queries,
        keys,
        values,
        block_table_RB,
        tiles,
        out_TE,
        scale * math.log2(math.e),
        blocks * kv_heads,
        block_table_RB.stride(0),
        KV_HEADS=kv_heads,
        GROUP=group,
        SIZE=size,
        PAGE=page,
        KEYS=KEYS,
        STAGES=STAGES,
        COLUMNS=COLUMNS,
        NUMBER=NUMBER,
        num_warps=4,
    )
    return out_TE


@gluon.jit(do_not_specialize=["num_pages", "table_stride"])
def _prompt_kernel(
    queries: tma.tensor_descriptor,
    keys: tma.tensor_descriptor,
    values: tma.tensor_descriptor,
    table_ptr: gl.tensor,
    tiles_ptr: gl.tensor,
    out_ptr: gl.tensor,
    scale: gl.tensor,
    num_pages: gl.tensor,
    table_stride: gl.tensor,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    SIZE: gl.constexpr,
    PAGE: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    COLUMNS: gl.constexpr,
    NUMBER: gl.constexpr,
    num_warps: gl.constexpr,
) -> None:
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    MATRIX: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    SLOTS: gl.constexpr = STAGES * (SIZE // COPIED) * (KEYS // PAGE)
    # The copy engine fills a slot: 64 elements of each row of a page. In this order they are what products read.
    q_slots = gl.allocate_shared_memory(dtype, [4 * (SIZE // COPIED), COPIED // GROUP, GROUP, COPIED], queries.layout)
    k_slots = gl.allocate_shared_memory(dtype, [SLOTS, 1, PAGE, COPIED], keys.layout)
    v_slots = gl.allocate_shared_memory(dtype, [SLOTS, 1, PAGE, COPIED], values.layout)
    q = seen_as(q_slots, dtype, [4, COPIED, SIZE], MATRIX)
    k = seen_as(k_slots, dtype, [STAGES, KEYS, SIZE], MATRIX)
    v = seen_as(v_slots, dtype, [STAGES, KEYS, SIZE], MATRIX)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()
    bars = (q_full, q_free, k_full, v_full, k_free, v_free)
    works = gl.load(tiles_ptr + NUMBER) * KV_HEADS
    gl.warp_specialize(
        [
            (_compute, (q, k, v, bars, tiles_ptr, out_ptr, scale, works, 0,
                        KV_HEADS, GROUP, SIZE, PAGE, KEYS, STAGES, COLUMNS)),
            (_compute, (q, k, v, bars, tiles_ptr, out_ptr, scale, works, 1,
                        KV_HEADS, GROUP, SIZE, PAGE, KEYS, STAGES, COLUMNS)),
            (_fetch, (q_slots, k_slots, v_slots, bars, queries, keys, values, table_ptr, table_stride, tiles_ptr, works,
                      num_pages, KV_HEADS, GROUP, SIZE, PAGE, KEYS, STAGES, COLUMNS)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _fetch(
    q_slots: gl.shared_memory_descriptor,
    k_slots: gl.shared_memory_descriptor,
    v_slots: gl.shared_memory_descriptor,
    bars: gl.tuple,
    queries: tma.tensor_descriptor,
    keys: tma.tensor_descriptor,
    values: tma.tensor_descriptor,
    table_ptr: gl.tensor,
    table_stride: gl.tensor,
    tiles_ptr: gl.tensor,
    works: gl.tensor,
    num_pages: gl.tensor,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    SIZE: gl.constexpr,
    PAGE: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    COLUMNS: gl.constexpr,
) -> None:
    """The copying warp."""
    q_full, q_free, k_full, v_full, k_free, v_free = bars
    count = 0
    tiles_met = 0
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        kv_head = work % KV_HEADS
        token, attending, position, request, length, _ = _tile(tiles_ptr, work // KV_HEADS, COLUMNS)
        steps = gl.maximum((position + attending + KEYS - 1) // KEYS, 1)
        side, lap = tiles_met & 1, (tiles_met >> 1) & 1
        mbarrier.wait(q_free.index(side), lap ^ 1)
        mbarrier.expect(q_full.index(side), 2 * COPIED * SIZE * 2)
        for half in gl.static_range(2):
            for i in gl.static_range(SIZE // COPIED):
                place = [token + half * (COPIED // GROUP), kv_head * GROUP, i * COPIED]
                slot = (side * 2 + half) * (SIZE // COPIED) + i
                copy(queries, place, q_full.index(side), q_slots.index(slot))
        tiles_met += 1  # noqa: SIM113, kernels have no enumerate
        table = table_ptr + request.to(gl.int64) * table_stride
        for j in range(steps):
            stage, phase = count % STAGES, (count // STAGES) & 1
            mbarrier.wait(k_free.index(stage), phase ^ 1)
            _fetch_pages(
                k_slots, keys, k_full.index(stage), stage, table, steps - 1 - j, length, kv_head, num_pages,
                KV_HEADS, SIZE, PAGE, KEYS,
            )  # fmt: skip
            mbarrier.wait(v_free.index(stage), phase ^ 1)
            _fetch_pages(
                v_slots, values, v_full.index(stage), stage, table, steps - 1 - j, length, kv_head, num_pages,
                KV_HEADS, SIZE, PAGE, KEYS,
            )  # fmt: skip
            count += 1


@gluon.jit
def _fetch_pages(
    slots: gl.shared_memory_descriptor,
    source: tma.tensor_descriptor,
    bar: gl.shared_memory_descriptor,
    stage: gl.tensor,
    table: gl.tensor,
    step: gl.tensor,
    length: gl.tensor,
    kv_head: gl.tensor,
    num_pages: gl.tensor,
    KV_HEADS: gl.constexpr,
    SIZE: gl.constexpr,
    PAGE: gl.constexpr,
    KEYS: gl.constexpr,
) -> None:
    """Ask for the pages of a step. What lies beyond the source is read as zeros: pages that the request does not have,
    and, since its last page is read from before its start, what follows the last key. Those may hold anything.
    """
    mbarrier.expect(bar, KEYS * SIZE * 2)
    rest = length % PAGE
    for i in gl.static_range(KEYS // PAGE):
        first = step * KEYS + i * PAGE
        page = gl.load(table + step * (KEYS // PAGE) + i, mask=first < length, other=0)
        row = gl.where(first < length, page * KV_HEADS + kv_head, num_pages)
        shift = gl.where(first == length - rest, rest - PAGE, 0)
        for half in gl.static_range(SIZE // COPIED):
            slot = (stage * (SIZE // COPIED) + half) * (KEYS // PAGE) + i
            copy(source, [row, shift, half * COPIED], bar, slots.index(slot))


@gluon.jit
def _compute(
    q: gl.shared_memory_descriptor,
    k: gl.shared_memory_descriptor,
    v: gl.shared_memory_descriptor,
    bars: gl.tuple,
    tiles_ptr: gl.tensor,
    out_ptr: gl.tensor,
    scale: gl.tensor,
    works: gl.tensor,
    HALF: gl.constexpr,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    SIZE: gl.constexpr,
    PAGE: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    COLUMNS: gl.constexpr,
) -> None:
    """Four warps, which compute one half of the rows."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // SIZE, SIZE // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    q_full, q_free, k_full, v_full, k_free, v_free = bars
    scores_row = HALF * COPIED + gl.arange(0, COPIED, layout=gl.SliceLayout(1, SCORES))
    row = HALF * COPIED + gl.arange(0, COPIED, layout=gl.SliceLayout(1, STORED))
    dims = gl.arange(0, SIZE, layout=gl.SliceLayout(0, STORED))
    count = 0
    tiles_met = 0
    begin, stride = gl.program_id(0), gl.num_programs(0)
    token, attending, first_position, _, length, written = _tile(tiles_ptr, begin // KV_HEADS, COLUMNS)
    if begin < works:
        mbarrier.wait(q_full.index(0), 0)
        mbarrier.wait(k_full.index(0), 0)
    zeros = gl.zeros([COPIED, KEYS], gl.float32, SCORES)
    asked = warpgroup_mma(q.index(HALF), k.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    for work in range(begin, works, stride):
        following = gl.minimum(work + stride, works - 1) // KV_HEADS
        next_token, next_attending, next_position, _, next_length, next_written = _tile(tiles_ptr, following, COLUMNS)
        steps = gl.maximum((first_position + attending + KEYS - 1) // KEYS, 1)
        masked = gl.maximum(steps - gl.maximum(first_position + 1, 0) // KEYS, 1)  # with keys that not every row sees
        position = first_position + scores_row // GROUP
        best = gl.full([COPIED], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        total = gl.full([COPIED], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
        acc = gl.zeros([COPIED, SIZE], gl.float32, SUMS)
        side = tiles_met & 1
        mine = q.index(side * 2 + HALF)
        scores = warpgroup_mma_wait(0, [asked])
        mbarrier.arrive(k_free.index(count % STAGES), count=1)
        scores = _hide(scores, steps - 1, position, length, PAGE, KEYS, SCORES)
        weights, _fade, best, total = _weigh(scores, best, total, scale, True)
        p = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, SUMS, 2))
        for j in range(1, masked):
            acc, p, best, total = _advance(
                acc, p, best, total, mine, k, v, k_full, v_full, k_free, v_free, count, scale,
                steps - 1 - j, position, length, True, PAGE, KEYS, STAGES, SCORES, SUMS,
            )  # fmt: skip
            count += 1
        for j in range(masked, steps):
            acc, p, best, total = _advance(
                acc, p, best, total, mine, k, v, k_full, v_full, k_free, v_free, count, scale,
                steps - 1 - j, position, length, False, PAGE, KEYS, STAGES, SCORES, SUMS,
            )  # fmt: skip
            count += 1
        mbarrier.arrive(q_free.index(side), count=1)
        tiles_met += 1  # noqa: SIM113, kernels have no enumerate
        stage = count % STAGES
        mbarrier.wait(v_full.index(stage), (count // STAGES) & 1)
        sums_asked = warpgroup_mma(p, v.index(stage), acc, is_async=True)
        count += 1
        side, next_stage = tiles_met & 1, count % STAGES
        if work + stride < works:
            mbarrier.wait(q_full.index(side), (tiles_met >> 1) & 1)
            mbarrier.wait(k_full.index(next_stage), (count // STAGES) & 1)
        # The next tile's first scores; after the last tile they are of anything, and are not read.
        asked = warpgroup_mma(
            q.index(side * 2 + HALF), k.index(next_stage).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        acc = warpgroup_mma_wait(1, [sums_asked])
        mbarrier.arrive(v_free.index(stage), count=1)
        share = 1.0 / gl.where(total == 0.0, 1.0, total)
        acc = acc * gl.expand_dims(gl.convert_layout(share, gl.SliceLayout(1, SUMS)), 1)
        kv_head = work % KV_HEADS
        tokens = (token + row // GROUP).to(gl.int64)
        places = (tokens * (KV_HEADS * GROUP) + kv_head * GROUP + row % GROUP) * SIZE
        mask = gl.expand_dims(row // GROUP < written, 1)
        out = gl.convert_layout(acc.to(dtype), STORED)
        gl.store(out_ptr + gl.expand_dims(places, 1) + gl.expand_dims(dims, 0), out, mask=mask)
        token, attending, first_position = next_token, next_attending, next_position
        length, written = next_length, next_written
    warpgroup_mma_wait(0, [asked])


@gluon.jit
def _tile(tiles_ptr: gl.tensor, tile: gl.tensor, COLUMNS: gl.constexpr) -> tuple[gl.tensor, ...]:
    """See :func:`prompt_tiles`."""
    place = tiles_ptr + tile * COLUMNS
    return (
        gl.load(place),
        gl.load(place + 1),
        gl.load(place + 2),
        gl.load(place + 3),
        gl.load(place + 4),
        gl.load(place + 5),
    )


@gluon.jit
def _advance(
    acc: gl.tensor,
    p: gl.tensor,
    best: gl.tensor,
    total: gl.tensor,
    q: gl.shared_memory_descriptor,
    k: gl.shared_memory_descriptor,
    v: gl.shared_memory_descriptor,
    k_full: gl.shared_memory_descriptor,
    v_full: gl.shared_memory_descriptor,
    k_free: gl.shared_memory_descriptor,
    v_free: gl.shared_memory_descriptor,
    count: gl.tensor,
    scale: gl.tensor,
    step: gl.tensor,
    position: gl.tensor,
    length: gl.tensor,
    MASKED: gl.constexpr,
    PAGE: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    SCORES: gl.constexpr,
    SUMS: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor, gl.tensor, gl.tensor]:
    """Ask for the next scores and for the sums of the last step's weights, which run while others compute weights."""
    next_stage, stage = (count + 1) % STAGES, count % STAGES
    mbarrier.wait(k_full.index(next_stage), ((count + 1) // STAGES) & 1)
    zeros = gl.zeros([COPIED, KEYS], gl.float32, SCORES)
    scores_asked = warpgroup_mma(q, k.index(next_stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(stage), (count // STAGES) & 1)
    sums_asked = warpgroup_mma(p, v.index(stage), acc, is_async=True)
    scores = warpgroup_mma_wait(1, [scores_asked])
    mbarrier.arrive(k_free.index(next_stage), count=1)
    if MASKED:
        scores = _hide(scores, step, position, length, PAGE, KEYS, SCORES)
    weights, fade, best, total = _weigh(scores, best, total, scale, MASKED)
    acc = warpgroup_mma_wait(0, [sums_asked])
    mbarrier.arrive(v_free.index(stage), count=1)
    p = gl.convert_layout(weights.to(p.dtype), gl.DotOperandLayout(0, SUMS, 2))
    acc = acc * gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, SUMS)), 1)
    return acc, p, best, total


@gluon.jit
def _weigh(
    scores: gl.tensor, best: gl.tensor, total: gl.tensor, scale: gl.tensor, GUARDED: gl.constexpr
) -> tuple[gl.tensor, gl.tensor, gl.tensor, gl.tensor]:
    """One step of the online softmax; guarded where a row may not have seen any key yet."""
    new_best = gl.maximum(best, gl.max(scores, 1) * scale)
    shift = new_best
    if GUARDED:
        shift = gl.where(new_best == float("-inf"), 0.0, new_best)
    weights = gl.exp2(scores * scale - gl.expand_dims(shift, 1))
    fade = gl.exp2(best - shift)
    return weights, fade, new_best, total * fade + gl.sum(weights, 1)


@gluon.jit
def _hide(
    scores: gl.tensor,
    step: gl.tensor,
    position: gl.tensor,
    length: gl.tensor,
    PAGE: gl.constexpr,
    KEYS: gl.constexpr,
    SCORES: gl.constexpr,
) -> gl.tensor:
    """Leave scores of keys up to each row's position. A last page that is not full has its keys at its end."""
    key = step * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORES))
    rest = length % PAGE
    full = length - rest
    is_late = (key >= full) & (rest > 0)
    key = gl.where(is_late, key + rest - PAGE, key)
    key = gl.where(is_late & (key < full), FAR_AWAY, key)
    return gl.where(gl.expand_dims(key, 0) <= gl.expand_dims(position, 1), scores, float("-inf"))
