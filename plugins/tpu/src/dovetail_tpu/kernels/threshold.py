"""Thresholds of rows without sorting them: bisection on the bits of float32 numbers.

Read as integers, the bits of numbers from zero up grow with them, and those of negative ones with their magnitude. So a
threshold is found exactly, whatever the numbers, by halving the range of keys as often as a key has bits. Each halving
is one reduction of the row.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

_INFINITY = 0x7F800000
_MAGNITUDE = 0x7FFFFFFF
_BITS = 32


def ordered(x: Array) -> Array:
    """int32 keys in the order of float32 numbers; both zeros have key 0, and the key of ``-x`` is that of ``x``,
    negated.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, -(bits & _MAGNITUDE), bits)


def number(key: Array) -> Array:
    """The float32 number of a key."""
    bits = jnp.where(key < 0, ~_MAGNITUDE | -key, key)
    return lax.bitcast_convert_type(bits, jnp.float32)


def kth_largest(keys_SV: Array, k_S: Array) -> Array:
    """The ``k``-th largest key of each row, equals counted one by one; that of ``-inf`` if a row has fewer.

    Args:
        keys_SV: of :func:`ordered`, of numbers other than NaN.
        k_S: int32, 1 or more.

    Returns:
        int32 ``[S, 1]``.
    """
    with jax.enable_x64(False):
        return _last(len(keys_SV), lambda floor_S1: _counts(keys_SV >= floor_S1) >= k_S[:, None])


def last_reaching(keys_SV: Array, weights_SV: Array, amount_S1: Array) -> Array:
    """The largest key of each row from which on, going up, weights sum to an amount; that of ``-inf`` if all of them do
    not.

    Args:
        keys_SV: of :func:`ordered`, of numbers other than NaN.
        weights_SV: float32, none negative.
        amount_S1: float32. For 0 the result is above the largest key.

    Returns:
        int32 ``[S, 1]``.
    """
    with jax.enable_x64(False):

        def reaches(floor_S1: Array) -> Array:
            kept_SV = jnp.where(keys_SV >= floor_S1, weights_SV, 0.0)
            return jnp.sum(kept_SV, axis=1, keepdims=True) >= amount_S1

        return _last(len(keys_SV), reaches)


def _counts(marked_SV: Array) -> Array:
    return jnp.sum(marked_SV, axis=1, keepdims=True, dtype=jnp.int32)


def _last(rows: int, holds: Callable[[Array], Array]) -> Array:
    """The last key, from ``-inf`` to ``inf``, for which something holds that holds for all keys before it."""

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_S1, high_S1 = bounds
        middle_S1 = (low_S1 | high_S1) - ((low_S1 ^ high_S1) >> 1)  # their mean, rounded up, without overflow
        is_held_S1 = holds(middle_S1)
        return jnp.where(is_held_S1, middle_S1, low_S1), jnp.where(is_held_S1, high_S1, middle_S1 - 1)

    bounds = jnp.full((rows, 1), -_INFINITY, jnp.int32), jnp.full((rows, 1), _INFINITY, jnp.int32)
    return lax.fori_loop(0, _BITS, halve, bounds)[0]
