"""The first pass over a step's logits: each tile's best, and what filters need to know of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail.ops.random import Stream
from dovetail.ops.sampling import SamplingTensors
from dovetail_cuda.kernels.floors import is_filtered
from dovetail_cuda.kernels.noise import gumbel, row_key
from dovetail_cuda.kernels.overlap import overlapped, release, wait
from dovetail_cuda.kernels.ranking import CANDIDATES, GROUP, GROUPS, first_largest, group_maxima, tile_columns

UNFILTERED_GROUP = 16
"""Elements of a tile's group where no row has filters, which costs fewer registers."""

PARAMETERS = ("temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "seeds_ptr", "positions_ptr")
"""Arguments of which a program reads a single number: where they begin depends on the number of rows."""

_GROUPS = tl.constexpr(GROUPS)
_SAMPLE = tl.constexpr(int(Stream.SAMPLE))


class Scanned(NamedTuple):
    """What was found, and for the kernels that go on from it.

    Attributes:
        arguments: logits, their stride and width; columns of the parameters; of each tile the best element, packed, and
            where the row has filters the sum of ``exp(x - best)``; the maxima of its groups; scratch memory.
        best_ST: the tiles' best elements, which are among the arguments.
        vector: elements that a thread loads at once.
    """

    arguments: tuple[Any, ...]
    best_ST: Tensor
    vector: int


def scan(logits_SV: Tensor, params: SamplingTensors, *, filtered: bool, drawn: bool) -> Scanned:
    """Scale the rows that are not greedy, and find the best element of each tile.

    Args:
        filtered: whether any row has filters.
        drawn: add noise to rows without filters.
    """
    if logits_SV.stride(1) != 1:
        logits_SV = logits_SV.contiguous()
    (rows, width), device = logits_SV.shape, logits_SV.device
    group, vector = GROUP if filtered else UNFILTERED_GROUP, 16 // logits_SV.element_size()
    tiles = triton.cdiv(width, group * GROUPS)
    best = sums = maxima = scratch = torch.empty(rows, tiles, dtype=torch.int64, device=device)
    if filtered:
        sums = torch.empty(rows, tiles, dtype=torch.float32, device=device)
        maxima = torch.empty(rows, tiles * GROUPS, dtype=torch.float32, device=device)
        scratch = torch.empty(rows, 2 * CANDIDATES, dtype=torch.int64, device=device)
    arguments = (logits_SV, logits_SV.stride(0), width, *_columns(params), best, sums, maxima)
    _scan_kernel[(tiles, rows)](
        *arguments,
        FILTERED=filtered,
        DRAWN=drawn,
        GROUP=group,
        VECTOR=vector,
        num_warps=4,
        **overlapped(device),
    )
    return Scanned((*arguments, scratch), best, vector)


def _columns(params: SamplingTensors) -> list[Tensor]:
    """In the kernels' order."""
    columns = (params.temperature_S, params.top_k_S, params.top_p_S, params.min_p_S, params.seeds_S, params.positions_S)
    return [column.contiguous() for column in columns]


@triton.jit(do_not_specialize_on_alignment=PARAMETERS)
def _scan_kernel(
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
    FILTERED: tl.constexpr,
    DRAWN: tl.constexpr,
    GROUP: tl.constexpr,
    VECTOR: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    release(OVERLAP)
    wait(OVERLAP)
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = row * tl.num_programs(0) + tile
    columns = tile_columns(tile, GROUP, VECTOR)
    inside = columns < width
    x = tl.load(logits_ptr + row * stride + columns, mask=inside, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperature_ptr + row)
    if temperature != 0:
        x = tl.div_rn(x, temperature)
        if FILTERED and is_filtered(row, top_k_ptr, top_p_ptr, min_p_ptr):
            largest = tl.max(x)
            shift = tl.where(largest == float("-inf"), 0.0, largest)
            tl.store(sums_ptr + place, tl.sum(tl.exp(x - shift)))
            tl.store(maxima_ptr + place * _GROUPS + tl.arange(0, _GROUPS), group_maxima(x))
        elif DRAWN:
            key = row_key(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), _SAMPLE)
            x += gumbel(key, columns)
    tl.store(best_ptr + place, first_largest(x, columns, inside))
