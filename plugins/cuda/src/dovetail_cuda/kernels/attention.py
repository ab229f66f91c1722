"""Paged attention over a ragged batch: any mix of prompt chunks, decodes and drafts in one launch.

A program computes a tile: ``QUERIES`` tokens of one request for all query heads of one key/value head, which share
its loads. Tiles are numbered through all requests; a program finds its request by counting, so the grid depends on the
numbers of tokens and requests alone. Keys are walked with an online softmax (Milakov and Gimelshein 2018,
arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135). Where there are too few tiles to fill the device, the keys of each
are split among programs, the last of which joins the parts (Dao et al. 2023, flash decoding).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail_cuda.kernels.counters import counters
from dovetail_cuda.kernels.online_softmax import join, step
from dovetail_cuda.kernels.overlap import overlapped, release, wait
from dovetail_cuda.kernels.prefixes import SharedPrefixes
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
    tiling = tile(tokens, requests, kv_heads, group, size, context, q_THK.element_size(), processors(q_THK.device))
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
    prefixes: SharedPrefixes | None = None,
) -> Tensor:
    """:func:`paged_attention`, cut in a given way. Keys of ``prefixes`` have been attended to; the others remain."""
    tokens, heads, size = q_THK.shape
    kv_heads, requests, splits = k_cache_BPNK.shape[2], len(seq_lens_R), tiling.splits
    group, block = heads // kv_heads, max(16, triton.next_power_of_2(size))
    out_TE = torch.empty((tokens, heads * size), dtype=q_THK.dtype, device=q_THK.device)
    if not tokens:
        return out_TE
    queries = tiling.rows // group
    grid = (kv_heads, tokens // queries + requests + 1, splits)
    parts = sums = arrivals = out_TE  # not read
    if splits > 1:
        parts = torch.empty((splits, tokens, heads, size), dtype=torch.float32, device=q_THK.device)
        sums = torch.empty((splits, tokens, heads), dtype=torch.float32, device=q_THK.device)
        arrivals = counters(q_THK.device, triton.next_power_of_2(kv_heads * grid[1]))
    _attend_kernel[grid](
        q_THK,
        k_cache_BPNK,
        v_cache_BPNK,
        block_table_RB,
        query_start_R1,
        seq_lens_R,
        out_TE,
        parts,
        sums,
        arrivals,
        out_TE if prefixes is None else prefixes.tokens_R,
        out_TE if prefixes is None else prefixes.parts,
        out_TE if prefixes is None else prefixes.sums,
        *scale_and_cap(scale, soft_cap),
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
        PREFIX_PARTS=0 if prefixes is None else len(prefixes.parts),
        PRECISION="ieee" if q_THK.dtype == torch.float32 else "tf32",
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        **overlapped(q_THK.device),
    )
    return out_TE


@cache
def tile(
    tokens: int, requests: int, kv_heads: int, group: int, size: int, context: int, itemsize: int, processors: int
) -> Tiling:
    """How to cut a step of this size; every argument is known from the bucket."""
    per_request = -(-tokens // max(1, requests)) if tokens <= FEW else tokens
    block = max(16, triton.next_power_of_2(size))
    rows = triton.next_power_of_2(group * min(per_request, 128))
    rows = min(max(16, rows), most_rows(size, itemsize))
    rows = max(rows, triton.next_power_of_2(group))
    tiles = kv_heads * min(tokens, max(requests, -(-tokens // (rows // group))))  # most that have tokens, about
    widest = max(16, 32768 // (block * itemsize))
    splits = max(1, min(MAX_SPLITS, 2 * processors // max(1, tiles), -(-context // min(64, widest))))
    # Two programs on a multiprocessor keep memory busy by long steps; more of them are faster with short ones.
    keys = widest if rows == 16 and splits == 1 and tiles <= 2 * processors else min(widest, 64)
    return Tiling(rows=rows, keys=keys, splits=splits, warps=8 if rows >= 128 or splits > 1 else 4, stages=2)


def most_rows(size: int, itemsize: int) -> int:
    """Of a tile, for which there are registers."""
    return 16 if itemsize == 4 else 128 if size <= 128 else 64


def scale_and_cap(scale: float, soft_cap: float | None) -> tuple[float, float]:
    """Factors of scores and of what caps them, so that weights are powers of 2."""
    if soft_cap is None:
        return scale * math.log2(math.e), 0.0
    return scale / soft_cap, soft_cap * math.log2(math.e)


@cache
def processors(device: torch.device) -> int:
    """How many programs run side by side."""
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
    parts_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    shared_ptr: tl.tensor,
    prefix_parts_ptr: tl.tensor,
    prefix_sums_ptr: tl.tensor,
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
    PREFIX_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    release(OVERLAP)
    kv_head, split = tl.program_id(0), tl.program_id(2)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # a prompt's last tiles see most, so they start first
    request = segment_of(tile, starts_ptr, starts_stride, num_requests + 1, QUERIES)
    start = tl.load(starts_ptr + request * starts_stride)
    is_padding = request == num_requests  # tokens after the last request's
    end = tl.load(starts_ptr + (request + 1) * starts_stride, mask=request < num_requests, other=num_tokens)
    count = end - start
    offset = (tile - start // QUERIES - request) * QUERIES
    length = tl.load(lengths_ptr + request * lengths_stride, mask=request < num_requests, other=0)
    wait(OVERLAP)
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
        if split == 0:
            zeros = tl.zeros([ROWS, BLOCK], dtype=out_ptr.dtype.element_ty)
            tl.store(out_ptr + places[:, None] + dims[None, :], zeros, mask=out_mask)
        return

    first_position = length - count + offset
    position = first_position + row // GROUP
    stop = first_position + tl.minimum(QUERIES, count - offset)
    first = tl.maximum(0, first_position - WINDOW + 1) if WINDOW else 0
    if PREFIX_PARTS:
        first = tl.load(shared_ptr + request)
    begin = first // KEYS * KEYS
    parts = 1
    if SPLITS > 1:
        steps = tl.cdiv(stop - begin, KEYS)
        steps_each = tl.cdiv(steps, SPLITS)
        parts = tl.cdiv(steps, steps_each)
        if split >= parts:
            return
        begin += split * steps_each * KEYS
        stop = tl.minimum(stop, begin + steps_each * KEYS)

    q_places = token[:, None] * q_stride_t + head[:, None] * q_stride_h + dims[None, :] * q_stride_k
    q = tl.load(q_ptr + q_places, mask=out_mask, other=0.0)
    table = table_ptr + request.to(tl.int64) * table_stride_r
    k_head, v_head = k_ptr + kv_head * k_stride_n, v_ptr + kv_head * v_stride_n
    acc = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    best = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)

    if PREFIX_PARTS:  # noqa: SIM102, decided when it is compiled
        if (split == 0) & (first > 0):
            acc, best, total = join(
                prefix_parts_ptr, prefix_sums_ptr, token * HEADS + head, dims, row_mask, PREFIX_PARTS,
                num_tokens.to(tl.int64) * HEADS, ROWS, SIZE, BLOCK,
            )  # fmt: skip

    # Every row sees every key of the first steps, unless there is a window.
    seen_by_all = begin
    if not WINDOW:
        seen_by_all += tl.maximum(0, tl.minimum(stop, first_position + 1) - begin) // KEYS * KEYS
    for key in range(begin, seen_by_all, KEYS):
        acc, best, total = step(
            acc, best, total, q, k_head, v_head, table, key, position, first, stop, scale, cap, dims,
            k_stride_b, k_stride_p, k_stride_k, v_stride_b, v_stride_p, v_stride_k, table_stride_b,
            False, WINDOW, CAPPED, SIZE, BLOCK, PAGE, KEYS, PRECISION,
        )  # fmt: skip
    for key in range(seen_by_all, stop, KEYS):
        acc, best, total = step(
            acc, best, total, q, k_head, v_head, table, key, position, first, stop, scale, cap, dims,
            k_stride_b, k_stride_p, k_stride_k, v_stride_b, v_stride_p, v_stride_k, table_stride_b,
            True, WINDOW, CAPPED, SIZE, BLOCK, PAGE, KEYS, PRECISION,
        )  # fmt: skip

    total = tl.where(total == 0.0, 1.0, total)  # no key of this part is visible: best is -inf
    out = acc / total[:, None]
    if SPLITS > 1:  # noqa: SIM102, decided when it is compiled
        if parts > 1:
            # The last program of a tile that comes here joins what all have written.
            row_places = token * HEADS + head
            stride = num_tokens.to(tl.int64) * HEADS
            part_places = split * stride * SIZE + places[:, None] + dims[None, :]
            tl.store(parts_ptr + part_places, out, mask=out_mask)
            tl.store(sums_ptr + split * stride + row_places, best + tl.log2(total), mask=row_mask)
            tl.debug_barrier()
            counter = counters_ptr + tile * tl.num_programs(0) + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1:
                acc, best, total = join(
                    parts_ptr, sums_ptr, row_places, dims, row_mask, parts, stride, ROWS, SIZE, BLOCK
                )
                out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
                tl.store(out_ptr + places[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=out_mask)
                tl.store(counter, 0)  # for the next launch
            return
    tl.store(out_ptr + places[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=out_mask)
