"""The largest element of each row: the first of equals, and NaN counts as larger. Tiles first, then tiles of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail_cuda.kernels.overlap import overlapped, release, wait
from dovetail_cuda.kernels.ranking import GROUPS, first_largest, packed_column, tile_columns

GROUP = 16
"""Elements that a thread holds."""


def largest(x_SV: Tensor) -> Tensor:
    """``argmax`` of each row, int64 ``[S]``."""
    rows, width = x_SV.shape
    if x_SV.stride(1) != 1:
        x_SV = x_SV.contiguous()
    tiles = triton.cdiv(width, GROUP * GROUPS)
    best_ST = torch.empty(rows, tiles, dtype=torch.int64, device=x_SV.device)
    if rows:
        vector = 16 // x_SV.element_size()
        overlap = overlapped(x_SV.device)
        _scan_kernel[(tiles, rows)](
            x_SV, x_SV.stride(0), width, best_ST, SIZE=GROUP, VECTOR=vector, num_warps=4, **overlap
        )
    return best_column(best_ST, width)


def best_column(best_ST: Tensor, width: int) -> Tensor:
    """The column of each row's best tile, int64 ``[S]``, from the tiles' best elements, packed."""
    rows, tiles = best_ST.shape
    columns_S = torch.empty(rows, dtype=torch.int64, device=best_ST.device)
    if rows:
        size, overlap = triton.next_power_of_2(tiles), overlapped(best_ST.device)
        _choose_kernel[(rows,)](best_ST, columns_S, width, tiles, TILES=size, num_warps=1, **overlap)
    return columns_S


@triton.jit
def _scan_kernel(
    x_ptr: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    best_ptr: tl.tensor,
    SIZE: tl.constexpr,
    VECTOR: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    release(OVERLAP)
    wait(OVERLAP)
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tile_columns(tile, SIZE, VECTOR)
    inside = columns < width
    x = tl.load(x_ptr + row * stride + columns, mask=inside, other=float("-inf")).to(tl.float32)
    tl.store(best_ptr + row * tl.num_programs(0) + tile, first_largest(x, columns, inside))


@triton.jit
def _choose_kernel(
    best_ptr: tl.tensor,
    columns_ptr: tl.tensor,
    width: tl.tensor,
    tiles: tl.tensor,
    TILES: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    release(OVERLAP)
    wait(OVERLAP)
    row, tile = tl.program_id(0).to(tl.int64), tl.arange(0, TILES)
    best = tl.max(tl.load(best_ptr + row * tiles + tile, mask=tile < tiles, other=-0x8000000000000000))
    # whatever the tiles may hold, for the column is an index next
    tl.store(columns_ptr + row, tl.minimum(packed_column(best), width - 1).to(tl.int64))
