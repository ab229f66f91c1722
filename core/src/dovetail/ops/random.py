"""Stateless random numbers: a pure function of (seed, position, stream, vocabulary index).

No generator and no state, so a request draws the same numbers alone or in a batch, on any device, after any
preemption. Plain wrapping integer arithmetic, which every torch device computes bit for bit alike.

A row's 64-bit key comes from (seed, position, stream) through the finaliser of SplitMix64 (Steele, Lea and
Flood 2014, "Fast splittable pseudorandom number generators"). Column ``i`` of the row is then
``mix(mix(i) × odd + offset)`` with ``odd`` and ``offset`` the key's two words: an affine map per row over
hashed indices, so that no two rows are permutations of each other, and ``mix`` the 32-bit finaliser
``lowbias32`` (Wellons 2018, "Prospecting for hash functions").
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_TINY = 2.0**-31
_BELOW_ONE = 1.0 - 2.0**-24


class Stream(IntEnum):
    """Purposes that draw independent numbers at the same position of the same request."""

    SAMPLE = 0
    ACCEPT = 1
    RECOVER = 2
    DRAFT = 3


def row_keys(seeds_S: Tensor, positions_S: Tensor, stream: Stream) -> Tensor:
    """The int64 key of each row of noise.

    Args:
        seeds_S, positions_S: int64 ``[S]``.
        stream: what the numbers are for.
    """
    counter_S = positions_S * len(Stream) + int(stream)
    return _mix64(_mix64(seeds_S + signed64(_GOLDEN)) + counter_S * signed64(_GOLDEN))


def uniform(keys_S: Tensor, columns: Tensor) -> Tensor:
    """Uniform numbers in the open interval (0, 1), with a resolution of 2⁻³² at the lower end.

    Args:
        keys_S: from :func:`row_keys`.
        columns: integer ``[C]``, the same columns in each row, or ``[S, C]``.

    Returns:
        float32 ``[S, C]``.
    """
    odd_S1 = _word(keys_S >> 32).bitwise_or_(1).unsqueeze(1)
    offset_S1 = _word(keys_S).unsqueeze(1)
    bits = _mix32_(_mix32_(columns.to(torch.int32, copy=True)) * odd_S1 + offset_S1)
    # 31 bits in steps of 2⁻³¹: float32 keeps them all where numbers are small, which is where rare
    # events live.
    return bits.bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(_TINY).clamp_(max=_BELOW_ONE)


def gumbel(keys_S: Tensor, columns: Tensor) -> Tensor:
    """Standard Gumbel noise, float32 ``[S, C]``; arguments as for :func:`uniform`.

    ``argmax(logits + gumbel)`` is a draw from ``softmax(logits)`` (Gumbel 1954; Maddison et al. 2014,
    arXiv:1411.0030).
    """
    # -log(1 - u) rather than -log(u): the largest noise then comes from small u, which is finely resolved.
    return uniform(keys_S, columns).neg_().log1p_().neg_().log_().neg_()


def signed64(value: int) -> int:
    """The signed 64-bit integer with the bits of ``value``, which lies in -2⁶³ … 2⁶⁴ - 1."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _signed32(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


def _word(keys_S: Tensor) -> Tensor:
    """The low 32 bits as int32."""
    return ((keys_S + (1 << 31)) & 0xFFFFFFFF).sub_(1 << 31).to(torch.int32)


def _mix64(z: Tensor) -> Tensor:
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * signed64(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * signed64(0x94D049BB133111EB)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def _mix32_(x: Tensor) -> Tensor:
    """Mix in place. The mask turns torch's arithmetic shift into a logical one."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_signed32(0x846CA68B))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
