"""The lowest logit that min-p, top-k and top-p keep, as :mod:`dovetail.ops.sampling` defines it, without sorting a row.

A *floor* is a key (:mod:`dovetail_cuda.kernels.ranking`) of a logit over the temperature. The functions are for one
row, whose largest logit is finite:

    largest: its largest logit over the temperature.
    total: the sum of ``exp(x - largest)`` over the row.
    lowest: what min-p asks for, ``largest + log(min_p)``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dovetail_cuda.kernels.ranking import CANDIDATES, COARSE, bound, gather, ordered, scaled

CHUNK = 4096
"""Elements that are looked at at once where a whole row is searched."""

_CANDIDATES = tl.constexpr(CANDIDATES)
_COARSE = tl.constexpr(COARSE)
_CHUNK = tl.constexpr(CHUNK)
_NOTHING_BELOW = tl.constexpr(-0x7F800001)
"""The key of ``-inf``."""


@triton.jit
def is_filtered(row: tl.tensor, top_k_ptr: tl.tensor, top_p_ptr: tl.tensor, min_p_ptr: tl.tensor) -> tl.tensor:
    """Whether a row has a filter that may drop tokens."""
    return (tl.load(top_k_ptr + row) > 0) | (tl.load(top_p_ptr + row) < 1) | (tl.load(min_p_ptr + row) > 0)


@triton.jit
def find_candidates(
    row_ptr: tl.tensor,
    width: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    lowest: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    maxima_ptr: tl.tensor,
    groups: tl.tensor,
    scratch_ptr: tl.tensor,
    MAXIMA: tl.constexpr,
    VECTOR: tl.constexpr,
) -> tl.tensor:
    """Write tokens that hold all that are kept to the scratch memory, packed; returns their number. They are too many
    where it is more than CANDIDATES.
    """
    group = tl.arange(0, MAXIMA)
    maxima = tl.load(maxima_ptr + group, mask=group < groups, other=float("-inf"))
    keys = tl.where(group < groups, ordered(maxima), -0x80000000)
    # With a top-k the candidates are those of its tokens, else those of top-p; min-p is a bound by itself. The margin
    # is for sums that are rounded in another order.
    weights = tl.where(group < groups, tl.where(top_k > 0, 1.0, tl.exp(maxima - largest)), 0.0)
    most = tl.where(lowest > float("-inf"), float("inf"), top_p * total * 1.00001)
    reach = bound(keys, weights, tl.where(top_k > 0, top_k.to(tl.float32), most), 2, _COARSE)
    reach = tl.maximum(reach, tl.where(lowest > float("-inf"), ordered(lowest), -0x80000000))
    return gather(row_ptr, width, temperature, keys, reach, scratch_ptr, VECTOR)


@triton.jit
def floor_among(
    keys: tl.tensor,
    inside: tl.tensor,
    x: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    lowest: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
) -> tl.tensor:
    """The floor, from the candidates' keys and values; the others are ``-inf``."""
    floor = ordered(lowest)
    if top_k > 0:
        floor = tl.maximum(floor, bound(keys, tl.where(inside, 1.0, 0.0), top_k.to(tl.float32), 4, 1))
    if top_p < 1:
        masses = tl.exp(x - largest)
        kept = tl.where(floor <= _NOTHING_BELOW, total, tl.sum(tl.where(keys >= floor, masses, 0.0)))
        floor = tl.maximum(floor, tl.minimum(bound(keys, masses, top_p * kept, 4, 1), ordered(largest)))
    return floor


@triton.jit
def outer_floor(
    row_ptr: tl.tensor,
    width: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    lowest: tl.tensor,
    largest: tl.tensor,
) -> tl.tensor:
    """The floor of min-p and top-k, from the whole row."""
    floor = tl.maximum(ordered(lowest), _NOTHING_BELOW)
    if top_k > 0:
        kth = last_reaching(row_ptr, width, temperature, largest, -0x80000000, top_k.to(tl.float32), False)
        floor = tl.maximum(floor, kth)
    return floor


@triton.jit
def last_reaching(
    row_ptr: tl.tensor,
    width: tl.tensor,
    temperature: tl.tensor,
    largest: tl.tensor,
    low: tl.tensor,
    target: tl.tensor,
    MASS: tl.constexpr,
) -> tl.tensor:
    """The largest key from ``low`` on whose weight reaches the target, by bisection of the whole row."""
    first, beyond = tl.full((), 0, tl.int64) + low, ordered(largest).to(tl.int64) + 1
    while beyond - first > 1:
        middle = (first + beyond) >> 1
        enough = weight(row_ptr, width, temperature, largest, middle, MASS) >= target
        first, beyond = tl.where(enough, middle, first), tl.where(enough, beyond, middle)
    return first.to(tl.int32)


@triton.jit
def weight(
    row_ptr: tl.tensor,
    width: tl.tensor,
    temperature: tl.tensor,
    largest: tl.tensor,
    reach: tl.tensor,
    MASS: tl.constexpr,
) -> tl.tensor:
    """Of the elements that reach a key, the sum of ``exp(x - largest)``, or their number."""
    sums = tl.zeros((_CHUNK,), tl.float32)
    for first in range(0, width, _CHUNK):
        x = scaled(row_ptr, first + tl.arange(0, _CHUNK), width, temperature)
        sums += tl.where(ordered(x) >= reach, tl.exp(x - largest) if MASS else 1.0, 0.0)
    return tl.sum(sums)
