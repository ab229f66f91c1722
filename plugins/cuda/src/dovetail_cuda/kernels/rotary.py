"""Rotary positions, in place, queries and keys in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE = 1024
"""Pairs that a program turns."""


def rotary(q_THK: Tensor, k_TNK: Tensor, positions_T: Tensor, cos_sin_PK: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`dovetail.ops.reference.rotary`. The inputs themselves are turned, and returned."""
    tokens, half = len(positions_T), cos_sin_PK.shape[1] // 2
    if not tokens:
        return q_THK, k_TNK
    block = triton.next_power_of_2(half)
    heads = max(1, min(TILE // block, triton.next_power_of_2(q_THK.shape[1])))
    q_blocks, k_blocks = (triton.cdiv(x.shape[1], heads) for x in (q_THK, k_TNK))
    _rotary_kernel[(tokens, q_blocks + k_blocks)](
        q_THK,
        k_TNK,
        positions_T,
        cos_sin_PK,
        *q_THK.stride(),
        *k_TNK.stride(),
        positions_T.stride(0),
        cos_sin_PK.stride(0),
        Q_HEADS=q_THK.shape[1],
        K_HEADS=k_TNK.shape[1],
        Q_BLOCKS=q_blocks,
        HALF=half,
        HEADS=heads,
        BLOCK=block,
    )
    return q_THK, k_TNK


@triton.jit
def _rotary_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    table_ptr: tl.tensor,
    q_stride_t: tl.tensor,
    q_stride_h: tl.tensor,
    q_stride_k: tl.tensor,
    k_stride_t: tl.tensor,
    k_stride_h: tl.tensor,
    k_stride_k: tl.tensor,
    positions_stride: tl.tensor,
    table_stride: tl.tensor,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    Q_BLOCKS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pairs = tl.arange(0, BLOCK)[None, :]
    row = table_ptr + tl.load(positions_ptr + token * positions_stride) * table_stride + pairs
    cos = tl.load(row, mask=pairs < HALF, other=0.0)
    sin = tl.load(row + HALF, mask=pairs < HALF, other=0.0)
    if part < Q_BLOCKS:
        heads = part * HEADS + tl.arange(0, HEADS)[:, None]
        places = q_ptr + token * q_stride_t + heads * q_stride_h + pairs * q_stride_k
        _turn(places, HALF * q_stride_k, (heads < Q_HEADS) & (pairs < HALF), cos, sin)
    else:
        heads = (part - Q_BLOCKS) * HEADS + tl.arange(0, HEADS)[:, None]
        places = k_ptr + token * k_stride_t + heads * k_stride_h + pairs * k_stride_k
        _turn(places, HALF * k_stride_k, (heads < K_HEADS) & (pairs < HALF), cos, sin)


@triton.jit
def _turn(places: tl.tensor, half: tl.tensor, mask: tl.tensor, cos: tl.tensor, sin: tl.tensor) -> None:
    first = tl.load(places, mask=mask, other=0.0)
    second = tl.load(places + half, mask=mask, other=0.0)
    dtype: tl.constexpr = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    tl.store(places, (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(places + half, (second * cos + first * sin).to(dtype), mask=mask)
