"""Log-probabilities of a token, its rank, and the most likely tokens of each row, without writing a softmax."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail.ops import reference
from dovetail_cuda.kernels.overlap import overlapped, release, wait
from dovetail_cuda.kernels.ranking import (
    CANDIDATES,
    COARSE,
    GROUP,
    GROUPS,
    bound,
    gather,
    group_maxima,
    number,
    ordered,
    packed,
    packed_column,
    packed_key,
    scaled,
    tile_columns,
)

MOST = 128
"""Tokens to name per row at most; they are found one after the other."""
CHUNK = 4096
"""Elements that are looked at at once where a whole row is searched."""

_CANDIDATES = tl.constexpr(CANDIDATES)
_COARSE = tl.constexpr(COARSE)
_GROUP = tl.constexpr(GROUP)
_GROUPS = tl.constexpr(GROUPS)
_CHUNK = tl.constexpr(CHUNK)
_NONE = tl.constexpr(-0x8000000000000000)


def top_logprobs(logits_SV: Tensor, tokens_S: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`dovetail.ops.reference.top_logprobs`."""
    if k > MOST:
        return reference.top_logprobs(logits_SV, tokens_S, k)
    (rows, width), device = logits_SV.shape, logits_SV.device
    logprobs = torch.empty(rows, 1 + k, dtype=torch.float32, device=device)
    ranks_ids = torch.empty(rows, 1 + k, dtype=torch.int64, device=device)
    if rows:
        if logits_SV.stride(1) != 1:
            logits_SV = logits_SV.contiguous()
        tiles = triton.cdiv(width, GROUP * GROUPS)
        parts = torch.empty(rows, 3, tiles, dtype=torch.float32, device=device)
        maxima, scratch = parts, ranks_ids
        if k:
            maxima = torch.empty(rows, tiles * GROUPS, dtype=torch.float32, device=device)
            scratch = torch.empty(rows, 2 * CANDIDATES, dtype=torch.int64, device=device)
        arguments = (logits_SV, logits_SV.stride(0), width, tokens_S.contiguous(), parts, maxima)
        vector = 16 // logits_SV.element_size()
        _scan_kernel[(tiles, rows)](*arguments, NAMED=k > 0, VECTOR=vector, num_warps=4, **overlapped(device))
        _report_kernel[(rows,)](
            *arguments,
            scratch,
            logprobs,
            ranks_ids,
            tiles,
            k,
            NAMED=k > 0,
            TILES=triton.next_power_of_2(tiles),
            VECTOR=vector,
            num_warps=8 if k else 1,
            **overlapped(device),
        )
    return logprobs[:, 0], ranks_ids[:, 0], ranks_ids[:, 1:], logprobs[:, 1:]


@triton.jit
def _scan_kernel(
    logits_ptr: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    tokens_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    NAMED: tl.constexpr,
    VECTOR: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    release(OVERLAP)
    wait(OVERLAP)
    tile, row, tiles = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    row_ptr = logits_ptr + row * stride
    columns = tile_columns(tile, _GROUP, VECTOR)
    x = tl.load(row_ptr + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
    chosen = tl.load(row_ptr + tl.load(tokens_ptr + row)).to(tl.float32)
    largest = tl.max(x)
    place = row * 3 * tiles + tile
    tl.store(parts_ptr + place, largest)
    tl.store(parts_ptr + place + tiles, tl.sum(tl.exp(x - tl.where(largest == float("-inf"), 0.0, largest))))
    tl.store(parts_ptr + place + 2 * tiles, tl.sum((x > chosen).to(tl.float32)))
    if NAMED:
        place = (row * tiles + tile) * _GROUPS
        tl.store(maxima_ptr + place + tl.arange(0, _GROUPS), group_maxima(x))


@triton.jit(do_not_specialize=["k"])
def _report_kernel(
    logits_ptr: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    tokens_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    scratch_ptr: tl.tensor,
    logprobs_ptr: tl.tensor,
    ranks_ids_ptr: tl.tensor,
    tiles: tl.tensor,
    k: tl.tensor,
    NAMED: tl.constexpr,
    TILES: tl.constexpr,
    VECTOR: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    release(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    tile = tl.arange(0, TILES)
    parts_ptr += row * 3 * tiles + tile
    heights = tl.load(parts_ptr, mask=tile < tiles, other=float("-inf"))
    sums = tl.load(parts_ptr + tiles, mask=tile < tiles, other=0.0)
    above = tl.load(parts_ptr + 2 * tiles, mask=tile < tiles, other=0.0)
    largest = tl.max(heights)
    shift = tl.log(tl.sum(sums * tl.exp(heights - largest)))
    chosen = tl.load(row_ptr + tl.load(tokens_ptr + row)).to(tl.float32)
    logprobs_ptr += row * (1 + k)
    ranks_ids_ptr += row * (1 + k)
    tl.store(logprobs_ptr, chosen - largest - shift)
    tl.store(ranks_ids_ptr, tl.sum(above.to(tl.int32)).to(tl.int64) + 1)
    if NAMED:
        group = tl.arange(0, TILES * _GROUPS)
        inside = group < tiles * _GROUPS
        maxima = tl.load(maxima_ptr + row * tiles * _GROUPS + group, mask=inside, other=float("-inf"))
        keys = tl.where(inside, ordered(maxima), -0x80000000)
        reach = bound(keys, tl.where(inside, 1.0, 0.0), k.to(tl.float32), 2, _COARSE)
        scratch_ptr += row * (2 * _CANDIDATES)
        count = gather(row_ptr, width, 1.0, keys, reach, scratch_ptr, VECTOR)
        rank = tl.arange(0, _CANDIDATES)
        pairs = tl.load(scratch_ptr + rank, mask=rank < count, other=_NONE)
        last = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
        for place in range(1, k + 1):
            last = _next(row_ptr, width, last) if count > _CANDIDATES else tl.max(tl.where(pairs < last, pairs, _NONE))
            tl.store(logprobs_ptr + place, number(packed_key(last)) - largest - shift)
            tl.store(ranks_ids_ptr + place, packed_column(last).to(tl.int64))


@triton.jit
def _next(row_ptr: tl.tensor, width: tl.tensor, last: tl.tensor) -> tl.tensor:
    """The largest packed element of a row below the last one."""
    best = tl.full((_CHUNK,), _NONE, tl.int64)
    for first in range(0, width, _CHUNK):
        columns = first + tl.arange(0, _CHUNK)
        pairs = packed(ordered(scaled(row_ptr, columns, width, 1.0)), columns)
        best = tl.maximum(best, tl.where((columns < width) & (pairs < last), pairs, _NONE))
    return tl.max(best)
