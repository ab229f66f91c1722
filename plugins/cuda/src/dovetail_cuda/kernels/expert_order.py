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
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    cut = tl.where(totals > 0, tl.maximum((totals + ROWS - 1 - REST) // ROWS, 1), 0)
    ends = tl.cumsum(cut, axis=0)
    expert = tl.sum((ends[None, :] <= tile[:, None]).to(tl.int32), axis=1)
    here = bins[None, :] == expert[:, None]
    begin = _pick(starts - (ends - cut) * ROWS, here) + tl.where(expert < BINS, tile * ROWS, 0)
    tl.store(tiles_ptr + tile, expert, mask=tile < tiles)
    tl.store(tiles_ptr + tiles + tile, begin, mask=tile < tiles)
    tl.store(tiles_ptr + 2 * tiles + tile, _pick(starts + totals, here), mask=tile < tiles)


@triton.jit
def _pick(values: tl.tensor, here: tl.tensor) -> tl.tensor:
    """Of each row of ``here``, the value that it marks, or zero."""
    return tl.sum(tl.where(here, values[None, :], 0), axis=1)
