"""Paged attention over a ragged batch: any mix of prompt chunks, decodes and drafts in one launch, or two.

A program computes a tile: ``QUERIES`` tokens of one request for all query heads of one key/value head, which share
its loads. Tiles are numbered through all requests; a program finds its request by counting, so the grid depends on the
numbers of tokens and requests alone. Keys are walked with an online softmax (Milakov and Gimelshein 2018,
arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135). Where there are too few tiles to fill the device, the keys of each
are split among programs, and a second kernel joins the parts (Dao et al. 2023, flash decoding).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail_cuda.kernels.segments import segment_of

MAX_SPLITS = 64
FEW = 512
"""Steps of more tokens hold prompts, however many requests their bucket has room for."""
HOST_PROCESSORS = 4
"""Assumed where Triton interprets kernels on the host."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a launch is cut.

    Attributes:
        rows: of a tile: queries × query heads per key/value head, rounded up.
        keys: per step of the online softmax.
        splits: programs that share a tile's keys.
        warps, stages: of a program.
    """

    rows: int
    keys: int
    splits: int
    warps: int
    stages: int


def paged_attention(
    q_THK: Tensor,
    k_cache_BPNK: Tensor,
    v_cache_BPNK: Tensor,
    block_table_RB: Tensor,
    query_start_R1: Tensor,
    seq_lens_R: Tensor,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """See :func:`dovetail.ops.reference.paged_attention`."""
    tokens, heads, size = q_THK.shape
    requests, kv_heads, page = len(seq_lens_R), k_cache_BPNK.shape[2], k_cache_BPNK.shape[1]
    group = heads // kv_heads
    context = block_table_RB.shape[1] * page
    tiling = tile(tokens, requests, kv_heads, group, size, context, q_THK.element_size(), _processors(q_THK.device))
    return attend(
        q_THK, k_cache_BPNK, v_cache_BPNK, block_table_RB, query_start_R1, seq_lens_R, scale, window, soft_cap, tiling
    )


def attend(
    q_THK: Tensor,
    k_cache_BPNK: Tensor,
    v_cache_BPNK: Tensor,
    block_table_RB: Tensor,
    query_start_R1: Tensor,
    seq_lens_R: Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    tiling: Tiling,
) -> Tensor:
    """:func:`paged_attention`, cut in a given way."""
    tokens, heads, size = q_THK.shape
    kv_heads, requests, splits = k_cache_BPNK.shape[2], len(seq_lens_R), tiling.splits
    group, block = heads // kv_heads, max(16, triton.next_power_of_2(size))
    out_TE = torch.empty((tokens, heads * size), dtype=q_THK.dtype, device=q_THK.device)
    if not tokens:
        return out_TE
    parts = out_TE
    sums = out_TE
    if splits > 1:
        parts = torch.empty((splits, tokens, heads, size), dtype=torch.float32, device=q_THK.device)
        sums = torch.empty((splits, tokens, heads), dtype=torch.float32, device=q_THK.device)
    queries = tiling.rows // group
    _attend_kernel[(kv_heads, tokens // queries + requests + 1, splits)](
        q_THK,
        k_cache_BPNK,
        v_cache_BPNK,
        block_table_RB,
        query_start_R1,
        seq_lens_R,
        parts,
        sums,
        scale * math.log2(math.e) if soft_cap is None else scale / soft_cap,
        0.0 if soft_cap is None else soft_cap * math.log2(math.e),
        tokens,
        requests,
        *q_THK.stride(),
        *k_cache_BPNK.stride(),
        *v_cache_BPNK.stride(),
        *block_table_RB.stride(),
        query_start_R1.stride(0),
        seq_lens_R.stride(0),
        WINDOW=window or 0,
        CAPPED=soft_cap is not None,
        HEADS=heads,
        GROUP=group,
        SIZE=size,
        BLOCK=block,
        PAGE=k_cache_BPNK.shape[1],
        QUERIES=queries,
        ROWS=tiling.rows,
        KEYS=tiling.keys,
        SPLITS=splits,
        PRECISION="ieee" if q_THK.dtype == torch.float32 else "tf32",
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    if splits > 1:
        _join_kernel[(tokens, heads)](
            parts,
            sums,
            query_start_R1,
            out_TE,
            tokens,
            requests,
            query_start_R1.stride(0),
            HEADS=heads,
            SIZE=size,
            BLOCK=block,
            SPLITS=splits,
            SPLITS_BLOCK=triton.next_power_of_2(splits),
        )
    return out_TE


@cache
def tile(
    tokens: int, requests: int, kv_heads: int, group: int, size: int, context: int, itemsize: int, processors: int
) -> Tiling:
    """How to cut a step of this size; every argument is known from the bucket."""
    per_request = -(-tokens // max(1, requests)) if tokens <= FEW else tokens
    block = max(16, triton.next_power_of_2(size))
    is_short = per_request <= 8  # decodes and drafts are bound by memory, prompts by arithmetic
    most = 16 if itemsize == 4 else 128 if block <= 128 else 64
    rows = min(max(16, triton.next_power_of_2(group * min(per_request, 128))), most)
    rows = max(rows, triton.next_power_of_2(group))
    tiles = kv_heads * min(tokens, max(requests, -(-tokens // (rows // group))))  # most that have tokens, about
    widest = max(16, 32768 // (block * itemsize))
    splits = max(1, min(MAX_SPLITS, 2 * processors // max(1, tiles), -(-context // min(64, widest))))
    keys = min(widest, 32 if is_short and splits == 1 else 64)
    return Tiling(rows=rows, keys=keys, splits=splits, warps=8 if rows >= 128 else 4, stages=2)


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return HOST_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=["num_tokens", "num_requests"])
def _attend_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    table_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    out_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    num_tokens: tl.tensor,
    num_requests: tl.tensor,
    q_stride_t: tl.tensor,
    q_stride_h: tl.tensor,
    q_stride_k: tl.tensor,
    k_stride_b: tl.tensor,
    k_stride_p: tl.tensor,
    k_stride_n: tl.tensor,
    k_stride_k: tl.tensor,
    v_stride_b: tl.tensor,
    v_stride_p: tl.tensor,
    v_stride_n: tl.tensor,
    v_stride_k: tl.tensor,
    table_stride_r: tl.tensor,
    table_stride_b: tl.tensor,
    starts_stride: tl.tensor,
    lengths_stride: tl.tensor,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    kv_head, split = tl.program_id(0), tl.program_id(2)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # a prompt's last tiles see most, so they start first
    request = segment_of(tile, starts_ptr, starts_stride, num_requests + 1, QUERIES)
    start = tl.load(starts_ptr + request * starts_stride)
    is_padding = request == num_requests  # tokens after the last request's
    end = tl.load(starts_ptr + (request + 1) * starts_stride, mask=request < num_requests, other=num_tokens)
    offset = (tile - start // QUERIES - request) * QUERIES
    count = end - start
    if offset >= count:
        return

    row = tl.arange(0, ROWS)
    query = offset + row // GROUP
    row_mask = (row < QUERIES * GROUP) & (query < count)
    dims = tl.arange(0, BLOCK)
    token = (start + query).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    places = (token * HEADS + head) * SIZE
    out_mask = row_mask[:, None] & (dims < SIZE)[None, :]
    if is_padding:
        if SPLITS == 1:
            zeros = tl.zeros([ROWS, BLOCK], dtype=out_ptr.dtype.element_ty)
            tl.store(out_ptr + places[:, None] + dims[None, :], zeros, mask=out_mask)
        return

    first_position = tl.load(lengths_ptr + request * lengths_stride) - count + offset
    position = first_position + row // GROUP
    stop = first_position + tl.minimum(QUERIES, count - offset)
    first = tl.maximum(0, first_position - WINDOW + 1) if WINDOW else 0
    begin = first // KEYS * KEYS
    if SPLITS > 1:
        steps = tl.cdiv(tl.cdiv(stop - begin, KEYS), SPLITS)
        begin += split * steps * KEYS
        stop = tl.minimum(stop, begin + steps * KEYS)

    q_places = token[:, None] * q_stride_t + head[:, None] * q_stride_h + dims[None, :] * q_stride_k
    q = tl.load(q_ptr + q_places, mask=out_mask, other=0.0)
    table = table_ptr + request.to(tl.int64) * table_stride_r
    k_head, v_head = k_ptr + kv_head * k_stride_n, v_ptr + kv_head * v_stride_n
    acc = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    best = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)

    # Every row sees every key of the first steps, unless there is a window.
    seen_by_all = begin
    if not WINDOW:
        seen_by_all += tl.maximum(0, tl.minimum(stop, first_position + 1) - begin) // KEYS * KEYS
    for key in range(begin, seen_by_all, KEYS):
        acc, best, total = _step(
            acc, best, total, q, k_head, v_head, table, key, position, first, stop, scale, cap, dims,
            k_stride_b, k_stride_p, k_stride_k, v_stride_b, v_stride_p, v_stride_k, table_stride_b,
            False, WINDOW, CAPPED, SIZE, BLOCK, PAGE, KEYS, PRECISION,
        )  # fmt: skip
    for key in range(seen_by_all, stop, KEYS):
        acc, best, total = _step(
            acc, best, total, q, k_head, v_head, table, key, position, first, stop, scale, cap, dims,
            k_stride_b, k_stride_p, k_stride_k, v_stride_b, v_stride_p, v_stride_k, table_stride_b,
            True, WINDOW, CAPPED, SIZE, BLOCK, PAGE, KEYS, PRECISION,
        )  # fmt: skip

    total = tl.where(total == 0.0, 1.0, total)  # no key of this part is visible: best is -inf
    out = acc / total[:, None]
    if SPLITS == 1:
        tl.store(out_ptr + places[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=out_mask)
    else:
        part = split.to(tl.int64) * num_tokens * HEADS
        tl.store(out_ptr + (part * SIZE + places)[:, None] + dims[None, :], out, mask=out_mask)
        tl.store(sums_ptr + part + token * HEADS + head, best + tl.log2(total), mask=row_mask)


@triton.jit
def _step(
    acc: tl.tensor,
    best: tl.tensor,
    total: tl.tensor,
    q: tl.tensor,
    k_head: tl.tensor,
    v_head: tl.tensor,
    table: tl.tensor,
    key: tl.tensor,
    position: tl.tensor,
    first: tl.tensor,
    stop: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    dims: tl.tensor,
    k_stride_b: tl.tensor,
    k_stride_p: tl.tensor,
    k_stride_k: tl.tensor,
    v_stride_b: tl.tensor,
    v_stride_p: tl.tensor,
    v_stride_k: tl.tensor,
    table_stride_b: tl.tensor,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One step of the online softmax: ``KEYS`` keys from ``key`` on."""
    keys = key + tl.arange(0, KEYS)
    if MASKED:
        # Others may lie in blocks that hold anything; a weight of 0 would not hide infinities and NaN.
        exists = (keys >= first) & (keys < stop)
        blocks = tl.load(table + keys // PAGE * table_stride_b, mask=exists, other=0).to(tl.int64)
        v_mask = exists[:, None] & (dims < SIZE)[None, :]
        k_mask = exists[None, :] & (dims < SIZE)[:, None]
    else:
        blocks = tl.load(table + keys // PAGE * table_stride_b).to(tl.int64)
        v_mask = tl.full([KEYS, 1], True, tl.int1) & (dims < SIZE)[None, :]
        k_mask = tl.full([1, KEYS], True, tl.int1) & (dims < SIZE)[:, None]
    k_places = k_head + blocks * k_stride_b + keys % PAGE * k_stride_p
    v_places = v_head + blocks * v_stride_b + keys % PAGE * v_stride_p
    if MASKED or SIZE < BLOCK:
        k = tl.load(k_places[None, :] + dims[:, None] * k_stride_k, mask=k_mask, other=0.0)
        v = tl.load(v_places[:, None] + dims[None, :] * v_stride_k, mask=v_mask, other=0.0)
    else:
        k = tl.load(k_places[None, :] + dims[:, None] * k_stride_k)
        v = tl.load(v_places[:, None] + dims[None, :] * v_stride_k)
    scores = tl.dot(q, k.to(q.dtype), input_precision=PRECISION) * scale
    if CAPPED:
        fallen = tl.exp(-2.0 * tl.abs(scores))
        scores = tl.where(scores < 0, -cap, cap) * (1.0 - fallen) / (1.0 + fallen)  # cap × tanh
    if MASKED:
        visible = exists[None, :] & (keys[None, :] <= position[:, None])
        if WINDOW:
            visible &= keys[None, :] > position[:, None] - WINDOW
        scores = tl.where(visible, scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, axis=1))
    # a row that has seen no key yet has nothing to scale
    shift = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(best - shift)
    total = total * fade + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * fade[:, None], input_precision=PRECISION)
    return acc, new_best, total


@triton.jit(do_not_specialize=["num_tokens", "num_requests"])
def _join_kernel(
    parts_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_tokens: tl.tensor,
    num_requests: tl.tensor,
    starts_stride: tl.tensor,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
) -> None:
    """Weigh the parts of one token and head by their sums, which are kept as logarithms."""
    place = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    splits, dims = tl.arange(0, SPLITS_BLOCK), tl.arange(0, BLOCK)
    if tl.program_id(0) >= tl.load(starts_ptr + num_requests * starts_stride):  # padding, which has no parts
        zeros = tl.zeros([BLOCK], dtype=out_ptr.dtype.element_ty)
        tl.store(out_ptr + place * SIZE + dims, zeros, mask=dims < SIZE)
        return
    stride = num_tokens.to(tl.int64) * HEADS
    sums = tl.load(sums_ptr + splits * stride + place, mask=splits < SPLITS, other=float("-inf"))
    best = tl.max(sums, axis=0)
    weights = tl.exp2(sums - tl.where(best == float("-inf"), 0.0, best))
    mask = (sums != float("-inf"))[:, None] & (dims < SIZE)[None, :]
    parts_places = (splits * stride + place)[:, None] * SIZE + dims[None, :]
    parts = tl.load(parts_ptr + parts_places, mask=mask, other=0.0)
    total = tl.sum(weights, axis=0)
    out = tl.sum(parts * weights[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + place * SIZE + dims, out.to(out_ptr.dtype.element_ty), mask=dims < SIZE)
