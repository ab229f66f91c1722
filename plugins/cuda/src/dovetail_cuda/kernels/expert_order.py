"""Choices sorted by their experts, and cut into tiles: a counting sort that waits for nobody.

C: choices of all tokens; N: tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail_cuda.kernels.overlap import overlapped, release, wait

COUNTED = 512, 2048
"""Choices that a program counts, where there are few, and where there are many."""
PLACED = 32, 128
"""Choices that a program places."""
PROGRAMS = 128
"""From so many on, a program places more choices."""
TILES = 8
"""Tiles that it describes."""
SORTED = 4096
"""Choices up to which each is compared to all others."""
PART = 1024
"""Elements of a token that a program copies."""


class Order(NamedTuple):
    """Rows of the experts' products.

    Attributes:
        choices_C: int32: the choice that each row belongs to. Choices of no expert are missing, so the end is unset.
        tiles_3N: int32: expert, first row, and end of the expert's rows, of each tile; the last ones have no rows.
    """

    choices_C: Tensor
    tiles_3N: Tensor


def order_by_expert(expert_ids_TA: Tensor, experts: int, rows: int, rest: int) -> Order:
    """Sort stably.

    Args:
        expert_ids_TA: ids outside ``0 .. experts - 1`` belong to nobody.
        rows: of a tile; the last one of an expert may have fewer, or up to ``rest`` more.
        rest: less than ``rows``.
    """
    choices = expert_ids_TA.numel()
    device = expert_ids_TA.device
    tiles = choices // rows + min(experts, choices)
    order = Order(
        torch.empty(choices, dtype=torch.int32, device=device),
        torch.empty((3, tiles), dtype=torch.int32, device=device),
    )
    placed = min(PLACED[1], max(PLACED[0], triton.next_power_of_2(choices // PROGRAMS)))
    programs = max(triton.cdiv(choices, placed), triton.cdiv(tiles, TILES))
    counted = COUNTED[choices > COUNTED[0]]
    chunks = triton.cdiv(choices, counted)
    bins = triton.next_power_of_2(max(experts, 64))
    counts = torch.empty((chunks, bins), dtype=torch.int32, device=device)
    ids = (expert_ids_TA, *expert_ids_TA.stride(), choices, experts)
    shape = {"CHOICES": expert_ids_TA.shape[1], "BINS": bins, "COUNTED": counted, **overlapped(device)}
    if chunks > 1:
        _count_kernel[(chunks,)](*ids, counts, **shape, num_warps=8)
    _place_kernel[(programs,)](
        *ids,
        counts,
        *order,
        tiles,
        **shape,
        CHUNKS=triton.next_power_of_2(chunks),
        PLACED=placed,
        TILES=TILES,
        ROWS=rows,
        REST=rest,
        num_warps=8,
    )
    return order


def sort_by_expert(x_TD: Tensor, expert_ids_TA: Tensor, experts: int, rows: int) -> tuple[Order, Tensor]:
    """The order without rests, of at most ``SORTED`` choices, and the token of each choice in it: ``[C, D]``.

    There are as many comparisons as squared choices, and nothing that needs their results but to copy.
    """
    (tokens, chosen), device, width = expert_ids_TA.shape, expert_ids_TA.device, x_TD.shape[1]
    choices = tokens * chosen
    tiles = choices // rows + min(experts, choices)
    order = Order(
        torch.empty(choices, dtype=torch.int32, device=device),
        torch.empty((3, tiles), dtype=torch.int32, device=device),
    )
    x_CD = torch.empty((choices, width), dtype=x_TD.dtype, device=device)
    parts = triton.cdiv(width, PART)
    _sort_kernel[(tokens * parts + triton.cdiv(tiles, TILES),)](
        expert_ids_TA,
        *expert_ids_TA.stride(),
        choices,
        experts,
        *order,
        tiles,
        x_TD,
        x_CD,
        x_TD.stride(0),
        width,
        tokens,
        parts,
        CHOICES=chosen,
        TOGETHER=triton.next_power_of_2(chosen),
        BINS=triton.next_power_of_2(max(experts, 64)),
        COUNTED=max(COUNTED[0], triton.next_power_of_2(choices)),
        TILES=TILES,
        ROWS=rows,
        PART=PART,
        num_warps=4,
        **overlapped(device),
    )
    return order, x_CD


@triton.jit
def _ids(
    ids_ptr: tl.tensor,
    stride_t: tl.tensor,
    stride_a: tl.tensor,
    at: tl.tensor,
    choices: tl.tensor,
    experts: tl.tensor,
    CHOICES: tl.constexpr,
) -> tl.tensor:
    """The experts of some choices; the one beyond the last for choices of nobody."""
    ids = tl.load(ids_ptr + (at // CHOICES) * stride_t + (at % CHOICES) * stride_a, mask=at < choices, other=-1)
    return tl.where((ids >= 0) & (ids < experts), ids, experts).to(tl.int32)


@triton.jit(do_not_specialize=["choices"])
def _count_kernel(
    ids_ptr: tl.tensor,
    stride_t: tl.tensor,
    stride_a: tl.tensor,
    choices: tl.tensor,
    experts: tl.tensor,
    counts_ptr: tl.tensor,
    CHOICES: tl.constexpr,
    BINS: tl.constexpr,
    COUNTED: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    release(OVERLAP)
    wait(OVERLAP)
    chunk = tl.program_id(0)
    at = chunk * COUNTED + tl.arange(0, COUNTED)
    ids = _ids(ids_ptr, stride_t, stride_a, at, choices, experts, CHOICES)
    tl.store(counts_ptr + chunk * BINS + tl.arange(0, BINS), tl.histogram(ids, BINS, mask=ids < experts))


@triton.jit(do_not_specialize=["choices", "tiles"])
def _place_kernel(
    ids_ptr: tl.tensor,
    stride_t: tl.tensor,
    stride_a: tl.tensor,
    choices: tl.tensor,
    experts: tl.tensor,
    counts_ptr: tl.tensor,
    choices_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    tiles: tl.tensor,
    CHOICES: tl.constexpr,
    BINS: tl.constexpr,
    COUNTED: tl.constexpr,
    CHUNKS: tl.constexpr,
    PLACED: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    REST: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Place some choices, and describe some tiles."""
    release(OVERLAP)
    wait(OVERLAP)
    first = tl.program_id(0) * PLACED
    chunk = tl.minimum(first // COUNTED, (choices - 1) // COUNTED)
    around = chunk * COUNTED + tl.arange(0, COUNTED)
    ids = _ids(ids_ptr, stride_t, stride_a, around, choices, experts, CHOICES)
    before = tl.histogram(ids, BINS, mask=(ids < experts) & (around < first))
    bins = tl.arange(0, BINS)
    if CHUNKS == 1:
        totals = tl.histogram(ids, BINS, mask=ids < experts)
    else:
        chunks = tl.arange(0, CHUNKS)
        counts = tl.load(
            counts_ptr + chunks[:, None] * BINS + bins[None, :], mask=(chunks * COUNTED < choices)[:, None], other=0
        )
        totals = tl.sum(counts, axis=0)
        before += tl.sum(tl.where((chunks < chunk)[:, None], counts, 0), axis=0)
    starts = tl.cumsum(totals, axis=0) - totals
    own, others = first + tl.arange(0, PLACED), first + tl.arange(0, PLACED)
    own_ids = _ids(ids_ptr, stride_t, stride_a, own, choices, experts, CHOICES)
    other_ids = _ids(ids_ptr, stride_t, stride_a, others, choices, experts, CHOICES)
    base = _pick(starts + before, bins[None, :] == own_ids[:, None])
    earlier = (own_ids[:, None] == other_ids[None, :]) & (others[None, :] < own[:, None])
    tl.store(choices_ptr + base + tl.sum(earlier.to(tl.int32), axis=1), own, mask=own_ids < experts)
    _describe(tiles_ptr, tiles, tl.program_id(0) * TILES, starts, totals, BINS, TILES, ROWS, REST)


@triton.jit(do_not_specialize=["choices", "tiles", "tokens"])
def _sort_kernel(
    ids_ptr: tl.tensor,
    stride_t: tl.tensor,
    stride_a: tl.tensor,
    choices: tl.tensor,
    experts: tl.tensor,
    choices_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    tiles: tl.tensor,
    x_ptr: tl.tensor,
    sorted_ptr: tl.tensor,
    x_stride: tl.tensor,
    width: tl.tensor,
    tokens: tl.tensor,
    parts: tl.tensor,
    CHOICES: tl.constexpr,
    TOGETHER: tl.constexpr,
    BINS: tl.constexpr,
    COUNTED: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Place a token's choices and copy a part of it there, or describe some tiles."""
    release(OVERLAP)
    program = tl.program_id(0)
    others = tl.arange(0, COUNTED)
    wait(OVERLAP)
    ids = _ids(ids_ptr, stride_t, stride_a, others, choices, experts, CHOICES)
    if program < tokens * parts:
        token, part = program // parts, program % parts
        k = part * PART + tl.arange(0, PART)
        x = tl.load(x_ptr + token.to(tl.int64) * x_stride + k, mask=k < width)
        chosen = tl.arange(0, TOGETHER)
        own = token * CHOICES + chosen
        own_ids = _ids(ids_ptr, stride_t, stride_a, own, choices, experts, CHOICES)
        earlier = (ids[None, :] == own_ids[:, None]) & (others[None, :] < own[:, None])
        earlier = earlier | (ids[None, :] < own_ids[:, None])
        place = tl.sum(earlier.to(tl.int32), axis=1)
        exists = (own_ids < experts) & (chosen < CHOICES)
        places = sorted_ptr + place.to(tl.int64)[:, None] * width + k[None, :]
        copies = tl.broadcast_to(x[None, :], [TOGETHER, PART])
        tl.store(places, copies, mask=exists[:, None] & (k < width)[None, :])
        if part == 0:
            tl.store(choices_ptr + place, own, mask=exists)
    else:
        totals = tl.histogram(ids, BINS, mask=ids < experts)
        starts = tl.cumsum(totals, axis=0) - totals
        _describe(tiles_ptr, tiles, (program - tokens * parts) * TILES, starts, totals, BINS, TILES, ROWS, 0)


@triton.jit
def _describe(
    tiles_ptr: tl.tensor,
    tiles: tl.tensor,
    first: tl.tensor,
    starts: tl.tensor,
    totals: tl.tensor,
    BINS: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    """Some tiles of experts that have so many rows from there on."""
    tile = first + tl.arange(0, TILES)
    cut = tl.where(totals > 0, tl.maximum((totals + ROWS - 1 - REST) // ROWS, 1), 0)
    ends = tl.cumsum(cut, axis=0)
    expert = tl.sum((ends[None, :] <= tile[:, None]).to(tl.int32), axis=1)
    here = tl.arange(0, BINS)[None, :] == expert[:, None]
    begin = _pick(starts - (ends - cut) * ROWS, here) + tl.where(expert < BINS, tile * ROWS, 0)
    tl.store(tiles_ptr + tile, expert, mask=tile < tiles)
    tl.store(tiles_ptr + tiles + tile, begin, mask=tile < tiles)
    tl.store(tiles_ptr + 2 * tiles + tile, _pick(starts + totals, here), mask=tile < tiles)


@triton.jit
def _pick(values: tl.tensor, here: tl.tensor) -> tl.tensor:
    """Of each row of ``here``, the value that it marks, or zero."""
    return tl.sum(tl.where(here, values[None, :], 0), axis=1)
