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

CHUNK = 4096
"""Choices that a program counts at most."""


class Order(NamedTuple):
    """Rows of the experts' products.

    Attributes:
        choices_C: int32: the choice that each row belongs to. Choices of no expert are missing, so the end is unset.
        tiles_3N: int32: expert, first row, and end of the expert's rows, of each tile.
        count_1: int32: tiles that there are; others are unset.
    """

    choices_C: Tensor
    tiles_3N: Tensor
    count_1: Tensor


def order_by_expert(expert_ids_TA: Tensor, experts: int, rows: int) -> Order:
    """Sort stably.

    Args:
        expert_ids_TA: ids outside ``0 .. experts - 1`` belong to nobody.
        rows: of a tile, at most; a tile has rows of one expert alone.
    """
    choices = expert_ids_TA.numel()
    device = expert_ids_TA.device
    order = Order(
        torch.empty(choices, dtype=torch.int32, device=device),
        torch.empty((3, choices // rows + min(experts, choices)), dtype=torch.int32, device=device),
        torch.empty(1, dtype=torch.int32, device=device),
    )
    chunk = min(CHUNK, triton.next_power_of_2(max(choices, 64)))
    chunks = triton.cdiv(choices, chunk)
    bins = triton.next_power_of_2(max(experts, 64))
    counts = torch.empty((chunks, bins), dtype=torch.int32, device=device)
    ids = (expert_ids_TA, *expert_ids_TA.stride(), choices, experts)
    shape = {"CHOICES": expert_ids_TA.shape[1], "BINS": bins, "CHUNK": chunk}
    overlap = overlapped(device)
    if chunks > 1:
        _count_kernel[(chunks,)](*ids, counts, **shape, num_warps=8, **overlap)
    _place_kernel[(experts, chunks)](
        *ids,
        counts,
        *order,
        order.tiles_3N.shape[1],
        **shape,
        CHUNKS=triton.next_power_of_2(chunks),
        ROWS=rows,
        num_warps=4 if chunk <= 1024 else 8,
        **overlap,
    )
    return order


@triton.jit
def _ids(
    ids_ptr: tl.tensor,
    stride_t: tl.tensor,
    stride_a: tl.tensor,
    choices: tl.tensor,
    experts: tl.tensor,
    chunk: tl.tensor,
    CHOICES: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    """The experts of a chunk's choices; the one beyond the last for choices of nobody."""
    at = chunk * CHUNK + tl.arange(0, CHUNK)
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
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    release(OVERLAP)
    wait(OVERLAP)
    chunk = tl.program_id(0)
    ids = _ids(ids_ptr, stride_t, stride_a, choices, experts, chunk, CHOICES, CHUNK)
    tl.store(counts_ptr + chunk * BINS + tl.arange(0, BINS), tl.histogram(ids, BINS, mask=ids < experts))


@triton.jit(do_not_specialize=["choices", "slots"])
def _place_kernel(
    ids_ptr: tl.tensor,
    stride_t: tl.tensor,
    stride_a: tl.tensor,
    choices: tl.tensor,
    experts: tl.tensor,
    counts_ptr: tl.tensor,
    choices_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    count_ptr: tl.tensor,
    slots: tl.tensor,
    CHOICES: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Place one expert's choices of one chunk; with the first chunk, the expert's tiles."""
    release(OVERLAP)
    wait(OVERLAP)
    expert, chunk = tl.program_id(0), tl.program_id(1)
    bins = tl.arange(0, BINS)
    ids = _ids(ids_ptr, stride_t, stride_a, choices, experts, chunk, CHOICES, CHUNK)
    if CHUNKS == 1:
        totals = tl.histogram(ids, BINS, mask=ids < experts)
        earlier = 0
    else:
        chunks = tl.arange(0, CHUNKS)
        places = chunks[:, None] * BINS + bins[None, :]
        counts = tl.load(counts_ptr + places, mask=(chunks * CHUNK < choices)[:, None], other=0)
        totals = tl.sum(counts, axis=0)
        earlier = tl.sum(tl.sum(tl.where((chunks < chunk)[:, None] & (bins == expert)[None, :], counts, 0), axis=0))
    start = tl.sum(tl.where(bins < expert, totals, 0))
    mine = ids == expert
    rows = start + earlier + tl.cumsum(mine.to(tl.int32), axis=0) - 1
    tl.store(choices_ptr + rows, chunk * CHUNK + tl.arange(0, CHUNK), mask=mine)
    if chunk == 0:
        end = start + tl.sum(tl.where(bins == expert, totals, 0))
        first = tl.sum(tl.where(bins < expert, (totals + ROWS - 1) // ROWS, 0))
        count = (end - start + ROWS - 1) // ROWS
        for at in range(0, count, 32):
            tile = at + tl.arange(0, 32)
            slot = tiles_ptr + first + tile
            tl.store(slot, expert, mask=tile < count)
            tl.store(slot + slots, start + tile * ROWS, mask=tile < count)
            tl.store(slot + 2 * slots, end, mask=tile < count)
        if expert == experts - 1:
            tl.store(count_ptr, first + count)
