"""Stateless noise: the core's (``dovetail.ops.random``), bit for bit, from keys that it makes there.

Column ``i`` of a row is ``mix(mix(i) × odd + offset)``, where ``odd`` and ``offset`` are halves of the row's key and
``mix`` is the finaliser ``lowbias32`` (Wellons 2018, "Prospecting for hash functions"). Words of 32 bits suffice.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

_TINY = 2.0**-31
_BELOW_ONE = 1.0 - 2.0**-24


def uniform(words_S2: Array, columns: Array) -> Array:
    """Uniform numbers in the open interval (0, 1), with a resolution of 2⁻³² at the lower end.

    Args:
        words_S2: int32: the lower and the upper half of each row's key.
        columns: integers ``[C]``, the same in each row.

    Returns:
        float32 ``[S, C]``.
    """
    with jax.enable_x64(False):
        words_S2 = words_S2.astype(jnp.uint32)
        offset_S1, odd_S1 = words_S2[:, :1], words_S2[:, 1:] | 1
        bits_SC = _mix(_mix(columns.astype(jnp.uint32)) * odd_S1 + offset_S1) & 0x7FFFFFFF
        return jnp.minimum((bits_SC.astype(jnp.int32).astype(jnp.float32) + 0.5) * _TINY, _BELOW_ONE)


def gumbel(words_S2: Array, columns: Array) -> Array:
    """Standard Gumbel noise, float32 ``[S, C]``; arguments as for :func:`uniform`."""
    return -jnp.log(-jnp.log1p(-uniform(words_S2, columns)))


def _mix(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
