"""The draw that follows a rejected draft, from what is left of one distribution over another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail.ops.random import Stream
from dovetail.ops.sampling import SamplingTensors
from dovetail_cuda.kernels.noise import gumbel, row_key
from dovetail_cuda.kernels.overlap import overlapped, release, wait
from dovetail_cuda.kernels.ranking import first_largest, packed_column, packed_key

BLOCK = 2048

_RECOVER = tl.constexpr(int(Stream.RECOVER))
_NOTHING = tl.constexpr(-0x7F800001)
"""The key of ``-inf``, the logarithm of 0."""


def sample_residual(probs_RV: Tensor, draft_probs_RV: Tensor, params: SamplingTensors) -> Tensor:
    """See :func:`dovetail.ops.reference.sample_residual`."""
    (rows, width), device = probs_RV.shape, probs_RV.device
    tokens_R = torch.empty(rows, dtype=torch.int64, device=device)
    if rows:
        tiles = triton.cdiv(width, BLOCK)
        best = torch.empty(rows, 2, tiles, dtype=torch.int64, device=device)
        _draw_kernel[(tiles, rows)](
            probs_RV.contiguous(),
            draft_probs_RV.contiguous(),
            params.seeds_S.contiguous(),
            params.positions_S.contiguous(),
            best,
            width,
            BLOCK=BLOCK,
            num_warps=4,
            **overlapped(device),
        )
        size = triton.next_power_of_2(tiles)
        _choose_kernel[(rows,)](best, tokens_R, width, tiles, TILES=size, num_warps=1, **overlapped(device))
    return tokens_R


@triton.jit
def _draw_kernel(
    probs_ptr: tl.tensor,
    draft_probs_ptr: tl.tensor,
    seeds_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    best_ptr: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    release(OVERLAP)
    wait(OVERLAP)
    tile, row, tiles = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    columns = tile * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    probs = tl.load(probs_ptr + row * width + columns, mask=inside, other=0.0)
    left = tl.maximum(probs - tl.load(draft_probs_ptr + row * width + columns, mask=inside, other=0.0), 0.0)
    key = row_key(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), _RECOVER)
    noise = gumbel(key, columns)
    best_ptr += row * 2 * tiles + tile
    tl.store(best_ptr, first_largest(tl.log(left) + noise, columns, inside))
    tl.store(best_ptr + tiles, first_largest(tl.log(probs) + noise, columns, inside))


@triton.jit
def _choose_kernel(
    best_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    width: tl.tensor,
    tiles: tl.tensor,
    TILES: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    release(OVERLAP)
    wait(OVERLAP)
    row, tile = tl.program_id(0).to(tl.int64), tl.arange(0, TILES)
    best_ptr += row * 2 * tiles + tile
    left = tl.max(tl.load(best_ptr, mask=tile < tiles, other=-0x8000000000000000))
    whole = tl.max(tl.load(best_ptr + tiles, mask=tile < tiles, other=-0x8000000000000000))
    column = packed_column(tl.where(packed_key(left) > _NOTHING, left, whole))
    tl.store(tokens_ptr + row, tl.minimum(column, width - 1).to(tl.int64))
