"""A key or value of one head as a row of the cache, and back.

A row of int8 holds its own scale, so that a page takes no more bytes than its integers do, and what copies or shares a
page takes the scales along. The scale's bits, as bfloat16, are the lowest bits of the row's last 16 elements. Where a
head does not fill its lanes these are padding. Where it does, they are its last 16 values, which are rounded to the
even or odd integer that is nearest: to 7 bits in place of 8.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from dovetail_tpu.kernels.chip import LANES, in_lanes

SCALE_BITS = 16
LARGEST = 127
LARGEST_EVEN = 126
SUBLANES = 8
SMALLEST = 1e-30
"""Rows without a larger value are stored as zeros: their scale would be no normal number."""


def stored_rows(x_TNK: Array, dtype: jnp.dtype) -> Array:
    """Keys or values ``[T, N, K]`` as rows ``[T, N, Kp]``.

    They are rounded. Beyond the largest number of the cache's dtype they become that number, beyond bfloat16's in int8.

    Args:
        dtype: of the cache: int8, or a floating one.
    """
    padded = in_lanes(x_TNK.shape[2])
    if dtype == jnp.int8:
        return _int8_rows(jnp.pad(_cut_off(x_TNK.astype(jnp.float32), jnp.bfloat16), _lanes(x_TNK, padded)))
    narrow_TNK = x_TNK if x_TNK.dtype == dtype else _cut_off(x_TNK.astype(jnp.float32), dtype).astype(dtype)
    return jnp.pad(narrow_TNK, _lanes(x_TNK, padded))


def read_rows(rows_LNK: Array) -> Array:
    """Rows ``[L, N, Kp]`` as keys or values in float32. What pads a head is small, and not always zero."""
    wide_LNK = rows_LNK.astype(jnp.float32)
    if rows_LNK.dtype != jnp.int8:
        return wide_LNK
    places, rows, padded = rows_LNK.shape
    return wide_LNK * scales_of(rows_LNK.reshape(-1, padded)).reshape(places, rows, 1)


def scales_of(rows_LK: Array) -> Array:
    """Of rows ``[L, Kp]`` of int8, in float32 and along lanes: ``[1, L]``.

    By a product with powers of two, which is exact: it gathers a row's bits, and turns rows into lanes.
    """
    bits_LK = (rows_LK[:, -LANES:].astype(jnp.int32) & 1).astype(jnp.bfloat16)
    place_SK = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1) - (LANES - SCALE_BITS)
    power_SK = jnp.where(place_SK >= 0, 1 << jnp.maximum(place_SK, 0), 0).astype(jnp.float32).astype(jnp.bfloat16)
    sums_SL = lax.dot_general(
        power_SK,
        bits_LK,
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.DEFAULT,  # steps are traced at the highest, which no chip has for bfloat16
        preferred_element_type=jnp.float32,
    )
    return lax.bitcast_convert_type(sums_SL[:1].astype(jnp.int32) << 16, jnp.float32)


def _int8_rows(x_TNK: Array) -> Array:
    most_TN1 = jnp.max(jnp.abs(x_TNK), axis=-1, keepdims=True)
    exact_TN1 = jnp.where(most_TN1 > SMALLEST, most_TN1 / LARGEST, 0.0)
    # rounded up, so that values stay in range
    bits_TN1 = (lax.bitcast_convert_type(exact_TN1, jnp.int32) + 0xFFFF) >> 16
    scale_TN1 = lax.bitcast_convert_type(bits_TN1 << 16, jnp.float32)
    codes_TNK = jnp.where(scale_TN1 > 0.0, x_TNK / jnp.where(scale_TN1 > 0.0, scale_TN1, 1.0), 0.0)
    place_K = jnp.arange(x_TNK.shape[-1], dtype=jnp.int32) - (x_TNK.shape[-1] - SCALE_BITS)
    bit_TNK = (bits_TN1 >> jnp.maximum(place_K, 0)) & 1
    even_TNK = jnp.minimum(2 * jnp.round((codes_TNK - bit_TNK) / 2), LARGEST_EVEN)
    return jnp.where(place_K >= 0, even_TNK + bit_TNK, jnp.round(codes_TNK)).astype(jnp.int8)


def _cut_off(x_TNK: Array, dtype: jnp.dtype) -> Array:
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x_TNK, -largest, largest)


def _lanes(x_TNK: Array, padded: int) -> tuple[tuple[int, int], ...]:
    return (0, 0), (0, 0), (0, padded - x_TNK.shape[2])
