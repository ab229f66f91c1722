"""Prefixes that decoding requests share: their pages are read once for a group of requests, not once for each.

Requests share what a prefix cache gave them: the same pages at the head of their block tables. A group is so many
consecutive requests that their queries of one key/value head fill a tile of the matrix units. What is shared is found
on the device, so a graph serves any mix of requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail_cuda.kernels.online_softmax import step
from dovetail_cuda.kernels.overlap import overlapped, release, wait

FEWEST_REQUESTS = 65
"""With fewer, there is less to save, and for finding nothing each layer pays the same 3 µs."""
LEAST_SHARED = 128
"""Tokens; less than that costs more to join than to read."""
KEYS = 64
_PAGES_COMPARED: tl.constexpr = tl.constexpr(32)


@dataclass(frozen=True, slots=True)
class Grouping:
    """How requests are put together.

    Attributes:
        requests: of a group, a power of 2.
        rows: of its tile: requests × query heads per key/value head, rounded up.
        parts: programs that share a prefix's keys.
    """

    requests: int
    rows: int
    parts: int


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """What :func:`attend_prefixes` found.

    Attributes:
        tokens_R: int32 tokens of each request that its group shares.
        parts: float32 ``[parts, T, H, K]``: results over a part of the prefix, for the requests that share one.
        sums: float32 ``[parts, T, H]``: logarithm to base 2 of each part's sum of weights.
    """

    tokens_R: Tensor
    parts: Tensor
    sums: Tensor


def grouping(requests: int, kv_heads: int, group: int, most_rows: int, processors: int) -> Grouping | None:
    """How to group the requests of a step of this size; None if it is not worth looking for prefixes."""
    if requests < FEWEST_REQUESTS or most_rows < 2 * group:
        return None
    together = 1 << (min(requests, most_rows // group).bit_length() - 1)
    tiles = kv_heads * triton.cdiv(requests, together)
    rows = max(16, triton.next_power_of_2(together * group))
    return Grouping(together, rows, max(1, min(8, processors // tiles)))


def shared_tokens(
    block_table_RB: Tensor,
    query_start_R1: Tensor,
    seq_lens_R: Tensor,
    page: int,
    requests: int,
    least: int = LEAST_SHARED,
) -> Tensor:
    """int32 ``[R]``: how many tokens at the head of a request's pages all requests of its group share and see.

    A multiple of ``KEYS``; 0 for groups in which a request computes several tokens, and for padding.
    """
    count = len(seq_lens_R)
    tokens_R = torch.empty(count, dtype=torch.int32, device=seq_lens_R.device)
    _compare_kernel[(triton.cdiv(count, requests),)](
        block_table_RB,
        query_start_R1,
        seq_lens_R,
        tokens_R,
        count,
        *block_table_RB.stride(),
        query_start_R1.stride(0),
        seq_lens_R.stride(0),
        PAGE=page,
        REQUESTS=requests,
        KEYS=KEYS,
        LEAST=least,
        **overlapped(seq_lens_R.device),
    )
    return tokens_R


def attend_prefixes(
    q_THK: Tensor,
    k_cache_BPNK: Tensor,
    v_cache_BPNK: Tensor,
    block_table_RB: Tensor,
    query_start_R1: Tensor,
    tokens_R: Tensor,
    scale: float,
    cap: float,
    is_capped: bool,
    grouped: Grouping,
) -> SharedPrefixes:
    """Attend over the prefixes alone. ``scale`` and ``cap`` are those of :func:`online_softmax.step`."""
    tokens, heads, size = q_THK.shape
    kv_heads, requests = k_cache_BPNK.shape[2], len(tokens_R)
    parts = torch.empty((grouped.parts, tokens, heads, size), dtype=torch.float32, device=q_THK.device)
    sums = torch.empty((grouped.parts, tokens, heads), dtype=torch.float32, device=q_THK.device)
    _prefix_kernel[(kv_heads, triton.cdiv(requests, grouped.requests), grouped.parts)](
        q_THK,
        k_cache_BPNK,
        v_cache_BPNK,
        block_table_RB,
        query_start_R1,
        tokens_R,
        parts,
        sums,
        scale,
        cap,
        tokens,
        requests,
        *q_THK.stride(),
        *k_cache_BPNK.stride(),
        *v_cache_BPNK.stride(),
        *block_table_RB.stride(),
        query_start_R1.stride(0),
        CAPPED=is_capped,
        HEADS=heads,
        GROUP=heads // kv_heads,
        SIZE=size,
        BLOCK=max(16, triton.next_power_of_2(size)),
        PAGE=k_cache_BPNK.shape[1],
        REQUESTS=grouped.requests,
        ROWS=grouped.rows,
        KEYS=KEYS,
        PARTS=grouped.parts,
        PRECISION="ieee" if q_THK.dtype == torch.float32 else "tf32",
        num_warps=8 if grouped.rows >= 128 else 4,
        num_stages=2,
        **overlapped(q_THK.device),
    )
    return SharedPrefixes(tokens_R, parts, sums)


@triton.jit(do_not_specialize=["num_requests"])
def _compare_kernel(
    table_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    shared_ptr: tl.tensor,
    num_requests: tl.tensor,
    table_stride_r: tl.tensor,
    table_stride_b: tl.tensor,
    starts_stride: tl.tensor,
    lengths_stride: tl.tensor,
    PAGE: tl.constexpr,
    REQUESTS: tl.constexpr,
    KEYS: tl.constexpr,
    LEAST: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """How many tokens the requests of one group share."""
    release(OVERLAP)
    wait(OVERLAP)
    first = tl.program_id(0) * REQUESTS
    request = first + tl.arange(0, REQUESTS)
    exists = request < num_requests
    start = tl.load(starts_ptr + request * starts_stride, mask=exists, other=0)
    count = tl.load(starts_ptr + (request + 1) * starts_stride, mask=exists, other=0) - start
    length = tl.load(lengths_ptr + request * lengths_stride, mask=exists, other=0)
    first_count = tl.load(starts_ptr + (first + 1) * starts_stride) - tl.load(starts_ptr + first * starts_stride)
    is_real = exists & (count > 0)
    pages = tl.min(tl.where(is_real, length - count, 2147483647), axis=0) // PAGE
    is_grouped = (tl.max(tl.where(exists, count, 0), axis=0) == 1) & (tl.sum(is_real.to(tl.int32), axis=0) > 1)
    same = tl.where(is_grouped & (first_count == 1), pages, 0)
    page = 0
    while page < same:
        pages_read = page + tl.arange(0, _PAGES_COMPARED)
        own_places = request[:, None].to(tl.int64) * table_stride_r + pages_read[None, :] * table_stride_b
        mask = is_real[:, None] & (pages_read < pages)[None, :]
        own = tl.load(table_ptr + own_places, mask=mask, other=0)
        firsts = tl.load(
            table_ptr + first.to(tl.int64) * table_stride_r + pages_read * table_stride_b,
            mask=pages_read < pages,
            other=0,
        )
        differs = mask & (own != firsts[None, :])
        same = tl.minimum(same, tl.min(tl.min(tl.where(differs, pages_read[None, :], pages), axis=1), axis=0))
        page += _PAGES_COMPARED
    tokens = same * PAGE // KEYS * KEYS
    tokens = tl.where(tokens < LEAST, 0, tokens)
    tl.store(shared_ptr + request, tl.full([REQUESTS], tokens, tl.int32), mask=exists)


@triton.jit(do_not_specialize=["num_tokens", "num_requests"])
def _prefix_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    table_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    shared_ptr: tl.tensor,
    parts_ptr: tl.tensor,
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
    CAPPED: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    REQUESTS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """The queries of a group of requests over a part of the prefix that they share."""
    release(OVERLAP)
    wait(OVERLAP)
    kv_head, first, part = tl.program_id(0), tl.program_id(1) * REQUESTS, tl.program_id(2)
    shared = tl.load(shared_ptr + first)
    if shared == 0:
        return
    steps_each = tl.cdiv(shared // KEYS, PARTS)
    begin = part * steps_each * KEYS
    stop = tl.minimum(shared, begin + steps_each * KEYS)

    row, dims = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    request = first + row // GROUP
    row_mask = (row < REQUESTS * GROUP) & (request < num_requests)
    start = tl.load(starts_ptr + request * starts_stride, mask=row_mask, other=0)
    row_mask &= tl.load(starts_ptr + (request + 1) * starts_stride, mask=row_mask, other=0) > start
    token, head = start.to(tl.int64), kv_head * GROUP + row % GROUP
    mask = row_mask[:, None] & (dims < SIZE)[None, :]
    q_places = token[:, None] * q_stride_t + head[:, None] * q_stride_h + dims[None, :] * q_stride_k
    q = tl.load(q_ptr + q_places, mask=mask, other=0.0)
    table = table_ptr + first.to(tl.int64) * table_stride_r
    k_head, v_head = k_ptr + kv_head * k_stride_n, v_ptr + kv_head * v_stride_n
    acc = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    best = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for key in range(begin, stop, KEYS):
        acc, best, total = step(
            acc, best, total, q, k_head, v_head, table, key, row, 0, stop, scale, cap, dims,
            k_stride_b, k_stride_p, k_stride_k, v_stride_b, v_stride_p, v_stride_k, table_stride_b,
            False, 0, CAPPED, SIZE, BLOCK, PAGE, KEYS, PRECISION,
        )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)
    places = part.to(tl.int64) * num_tokens * HEADS + token * HEADS + head
    tl.store(parts_ptr + (places * SIZE)[:, None] + dims[None, :], acc / total[:, None], mask=mask)
    tl.store(sums_ptr + places, best + tl.log2(total), mask=row_mask)
