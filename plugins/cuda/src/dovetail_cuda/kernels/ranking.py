"""Rows of logits by order: keys that compare as the numbers do, and the candidates for a row's largest without sorting
it.

A first kernel walks a row's tiles and notes the largest of every few elements, its *maxima*. A second one finds, among
the maxima alone, a bound that enough elements of the row provably reach, and gathers those that do.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = 32
"""Elements that share a maximum; a thread of the first kernel holds them all."""
GROUPS = 128
"""Groups of a tile."""
CANDIDATES = 1024
"""Candidates of a row at most; rows with more are searched as a whole."""
AT_ONCE = 64
"""Groups that are looked through at once."""
COARSE = 1 << 12
"""Steps of a bound among the maxima: a 2048th of a number. Smaller ones would save few candidates."""

_GROUP = tl.constexpr(GROUP)
_GROUPS = tl.constexpr(GROUPS)
_CANDIDATES = tl.constexpr(CANDIDATES)
_AT_ONCE = tl.constexpr(AT_ONCE)


@triton.jit
def tile_columns(tile: tl.tensor, SIZE: tl.constexpr, VECTOR: tl.constexpr) -> tl.tensor:
    """The columns of a tile, ``[SIZE / VECTOR, GROUPS, VECTOR]``; the second dimension counts groups of ``SIZE``."""
    outer = tl.arange(0, SIZE // VECTOR)[:, None, None] * (_GROUPS * VECTOR)
    group = tl.arange(0, _GROUPS)[None, :, None] * VECTOR
    return tile * (SIZE * _GROUPS) + outer + group + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def group_columns(groups: tl.tensor, VECTOR: tl.constexpr) -> tl.tensor:
    """The columns of the given groups, ``[groups, GROUP]``; groups count on from tile to tile."""
    member = tl.arange(0, _GROUP)
    first = groups // _GROUPS * (_GROUP * _GROUPS) + groups % _GROUPS * VECTOR
    return first[:, None] + (member // VECTOR * (_GROUPS * VECTOR) + member % VECTOR)[None, :]


@triton.jit
def group_maxima(x: tl.tensor) -> tl.tensor:
    """``[GROUPS]`` of a tile."""
    return tl.max(tl.max(x, axis=2), axis=0)


@triton.jit
def ordered(x: tl.tensor) -> tl.tensor:
    """An int32 key for each float32: NaN is the largest, and the zeros are equal."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def number(key: tl.tensor) -> tl.tensor:
    """The float32 behind a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def packed(key: tl.tensor, column: tl.tensor) -> tl.tensor:
    """Key and column in an int64 that is largest for the largest key, and among equals for the lowest column."""
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)


@triton.jit
def first_largest(x: tl.tensor, columns: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """The largest element, packed; of equals the one of the lowest column."""
    keys = tl.where(inside, ordered(x), -0x80000000)
    best = tl.max(keys)
    return packed(best, tl.min(tl.where(keys == best, columns, 0x7FFFFFFF)))


@triton.jit
def packed_key(pair: tl.tensor) -> tl.tensor:
    """The key of a pair."""
    return (pair >> 32).to(tl.int32)


@triton.jit
def packed_column(pair: tl.tensor) -> tl.tensor:
    """The column of a pair."""
    return 0x7FFFFFFF - (pair & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def bound(keys: tl.tensor, weights: tl.tensor, target: tl.tensor, WAYS: tl.constexpr, STEP: tl.constexpr) -> tl.tensor:
    """The largest key, counted from the smallest int32 in steps of ``STEP``, such that the weights of the keys that
    reach it sum to the target; the smallest int32 if all together do not. Each round tries ``WAYS`` keys, a power of
    two.
    """
    found = tl.full((), -0x80000000, tl.int64)
    way = tl.arange(0, WAYS).to(tl.int64)
    step = tl.full((), 0x100000000, tl.int64)
    while step > STEP:
        step = step // WAYS
        if WAYS == 2:
            tried = (found + step).to(tl.int32)
            found += step * (tl.sum(tl.where(keys >= tried, weights, 0.0)) >= target).to(tl.int64)
        else:
            tried = (found + way * step).to(tl.int32)
            reached = tl.sum(tl.where(keys[:, None] >= tried[None, :], weights[:, None], 0.0), axis=0)
            found += step * tl.sum(((reached >= target) & (way > 0)).to(tl.int64))
    return found.to(tl.int32)


@triton.jit
def scaled(row_ptr: tl.tensor, columns: tl.tensor, width: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """Logits of a row over the temperature, rounded as torch rounds; ``-inf`` beyond the row."""
    x = tl.load(row_ptr + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
    return tl.div_rn(x, temperature)


@triton.jit
def gather(
    row_ptr: tl.tensor,
    width: tl.tensor,
    temperature: tl.tensor,
    keys: tl.tensor,
    reach: tl.tensor,
    scratch_ptr: tl.tensor,
    VECTOR: tl.constexpr,
) -> tl.tensor:
    """Write the packed elements of a row that reach a key; returns their number. Where they are more than CANDIDATES,
    only that is sure.

    Args:
        keys: of the row's maxima; the smallest int32 where there is none.
        scratch_ptr: int64 ``[2 × CANDIDATES]``: the elements, and the groups to look at.
    """
    among = (keys >= reach) & (keys != -0x80000000)
    place = tl.cumsum(among.to(tl.int32)) - 1
    tl.store(scratch_ptr + _CANDIDATES + place, tl.arange(0, keys.shape[0]).to(tl.int64), among & (place < _CANDIDATES))
    groups = tl.sum(among.to(tl.int32))
    count = tl.where(groups > _CANDIDATES, groups, 0)
    tl.debug_barrier()
    for first in range(0, tl.where(groups > _CANDIDATES, 0, groups), _AT_ONCE):
        turn = first + tl.arange(0, _AT_ONCE)
        group = tl.load(scratch_ptr + _CANDIDATES + turn, mask=turn < groups, other=0).to(tl.int32)
        members = tl.where((turn < groups)[:, None], group_columns(group, VECTOR), width)
        columns = tl.reshape(members, (_AT_ONCE * _GROUP,))
        key = ordered(scaled(row_ptr, columns, width, temperature))
        chosen = (key >= reach) & (columns < width)
        free = count + tl.cumsum(chosen.to(tl.int32)) - 1
        tl.store(scratch_ptr + free, packed(key, columns), chosen & (free < _CANDIDATES))
        count += tl.sum(chosen.to(tl.int32))
    tl.debug_barrier()
    return count
