"""From logits to tokens, as :mod:`dovetail.ops.sampling` defines it, without sorting a row and without waiting for the
device.

A first kernel walks tiles: it scales, draws noise for rows without filters, and keeps each tile's best. A second one
has a program per row: it takes the best of the tiles, or, for rows with filters, finds the few candidates that can be
kept (:mod:`dovetail_cuda.kernels.ranking`), the floor among them, and draws. A row that may keep more than those is
drawn from as a whole; a token that turns out to be dropped bounds the next draw from below, as FlashInfer does (Ye et
al. 2025, arXiv:2501.01005). The outcome is the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail.ops.random import Stream
from dovetail.ops.sampling import SamplingTensors
from dovetail_cuda.kernels.floors import CHUNK, find_candidates, floor_among, is_filtered, outer_floor, weight
from dovetail_cuda.kernels.largest import best_column, largest
from dovetail_cuda.kernels.noise import gumbel, row_key
from dovetail_cuda.kernels.overlap import overlapped, release, wait
from dovetail_cuda.kernels.ranking import (
    CANDIDATES,
    GROUPS,
    number,
    ordered,
    packed,
    packed_column,
    packed_key,
    scaled,
)
from dovetail_cuda.kernels.scan import PARAMETERS, scan

_CANDIDATES = tl.constexpr(CANDIDATES)
_CHUNK = tl.constexpr(CHUNK)
_SAMPLE = tl.constexpr(int(Stream.SAMPLE))
_GROUPS = tl.constexpr(GROUPS)
_LOWEST = tl.constexpr(-0x7F800001)
_HIGHEST = tl.constexpr(0x7F800000)


def sample(logits_SV: Tensor, params: SamplingTensors) -> Tensor:
    """See :func:`dovetail.ops.reference.sample`."""
    rows, width = logits_SV.shape
    if params.all_greedy or not rows:
        return largest(logits_SV)
    scanned = scan(logits_SV, params, filtered=params.any_filter, drawn=True)
    if not params.any_filter:
        return best_column(scanned.best_ST, width)
    tiles = scanned.best_ST.shape[1]
    tokens_S = torch.empty(rows, dtype=torch.int64, device=logits_SV.device)
    _choose_kernel[(rows,)](
        *scanned.arguments,
        tokens_S,
        tiles,
        TILES=triton.next_power_of_2(tiles),
        VECTOR=scanned.vector,
        num_warps=16,
        **overlapped(logits_SV.device),
    )
    return tokens_S


@triton.jit(do_not_specialize_on_alignment=PARAMETERS)
def _choose_kernel(
    logits_ptr: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    seeds_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    best_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    scratch_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    tiles: tl.tensor,
    TILES: tl.constexpr,
    VECTOR: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    release(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    pairs = tl.load(best_ptr + row * tiles + tile, mask=tile < tiles, other=-0x8000000000000000)
    best = tl.max(pairs)
    column = packed_column(best)
    temperature = tl.load(temperature_ptr + row)
    highest = packed_key(best)
    # of rows with NaN or nothing finite, the best is the outcome whatever the filters
    drawn = (temperature != 0) & is_filtered(row, top_k_ptr, top_p_ptr, min_p_ptr)
    if drawn & (highest > _LOWEST) & (highest < _HIGHEST):
        sums = tl.load(sums_ptr + row * tiles + tile, mask=tile < tiles, other=0.0)
        heights = tl.where(tile < tiles, number(packed_key(pairs)), float("-inf"))
        total = tl.sum(sums * tl.exp(heights - number(highest)))
        column = _draw(
            logits_ptr + row * stride,
            width,
            temperature,
            tl.load(top_k_ptr + row).to(tl.int32),
            tl.load(top_p_ptr + row),
            tl.load(min_p_ptr + row),
            row_key(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), _SAMPLE),
            number(highest),
            total,
            maxima_ptr + row * tiles * _GROUPS,
            tiles * _GROUPS,
            scratch_ptr + row * (2 * _CANDIDATES),
            TILES * _GROUPS,
            VECTOR,
        )
    # whatever the scan may have left, for the token is an index next
    tl.store(tokens_ptr + row, tl.minimum(column, width - 1).to(tl.int64))


@triton.jit
def _draw(
    row_ptr: tl.tensor,
    width: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    noise_key: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    maxima_ptr: tl.tensor,
    groups: tl.tensor,
    scratch_ptr: tl.tensor,
    MAXIMA: tl.constexpr,
    VECTOR: tl.constexpr,
) -> tl.tensor:
    """The token of a row with filters, whose logits are finite or ``-inf``."""
    top_k = tl.where(top_k < width, top_k, 0)
    lowest = largest + tl.log(min_p)
    limits = (top_k, top_p, lowest, largest, total)
    count = find_candidates(row_ptr, width, temperature, *limits, maxima_ptr, groups, scratch_ptr, MAXIMA, VECTOR)
    if count <= _CANDIDATES:
        column = _draw_among(scratch_ptr, count, *limits, noise_key)
    else:
        column = _draw_anywhere(row_ptr, width, temperature, *limits, noise_key)
    return column


@triton.jit
def _draw_among(
    scratch_ptr: tl.tensor,
    count: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    lowest: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    noise_key: tl.tensor,
) -> tl.tensor:
    """Draw among candidates that hold every token which is kept."""
    rank = tl.arange(0, _CANDIDATES)
    inside = rank < count
    pairs = tl.load(scratch_ptr + rank, mask=inside, other=_LOWEST << 32)
    keys, columns = packed_key(pairs), packed_column(pairs)
    x = number(keys)
    floor = floor_among(keys, inside, x, top_k, top_p, lowest, largest, total)
    scores = tl.where((keys >= floor) & inside, ordered(x + gumbel(noise_key, columns)), -0x80000000)
    return packed_column(tl.max(packed(scores, columns)))


@triton.jit
def _draw_anywhere(
    row_ptr: tl.tensor,
    width: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    lowest: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    noise_key: tl.tensor,
) -> tl.tensor:
    """Draw until the token is one that is kept; each one that is not raises the bound of the next draw."""
    reach = outer_floor(row_ptr, width, temperature, top_k, lowest, largest)
    if (reach > _LOWEST) & (top_p < 1):
        total = weight(row_ptr, width, temperature, largest, reach, True)
    column = tl.full((), 0, tl.int32)
    searching = True
    while searching:
        column = _best(row_ptr, width, temperature, noise_key, reach)
        drawn = ordered(tl.div_rn(tl.load(row_ptr + column).to(tl.float32), temperature))
        searching = (top_p < 1) & (drawn < ordered(largest)) & (drawn >= reach)
        reach = drawn + 1
        if searching:
            searching = weight(row_ptr, width, temperature, largest, reach, True) >= top_p * total
    return column


@triton.jit
def _best(
    row_ptr: tl.tensor, width: tl.tensor, temperature: tl.tensor, noise_key: tl.tensor, reach: tl.tensor
) -> tl.tensor:
    """The column with the highest score among the elements that reach a key."""
    best = tl.full((_CHUNK,), -0x80000000, tl.int32)
    chosen = tl.zeros((_CHUNK,), tl.int32)
    for first in range(0, width, _CHUNK):
        columns = first + tl.arange(0, _CHUNK)
        x = scaled(row_ptr, columns, width, temperature)
        scores = ordered(x + gumbel(noise_key, columns))
        better = (ordered(x) >= reach) & (scores > best)
        best, chosen = tl.where(better, scores, best), tl.where(better, columns, chosen)
    return packed_column(tl.max(packed(best, chosen)))
