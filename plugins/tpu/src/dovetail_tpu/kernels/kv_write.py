"""The paged cache of one layer, and storing keys and values in it.

``kv_X2NK [pages × P, rows, Kp]`` holds a token's key of head ``n`` in row ``2 n`` and its value in row ``2 n + 1``, see
:mod:`dovetail_tpu.kernels.kv_rows`. Page 0 belongs to padding tokens. Where a token's rows would not tile, XLA keeps
the cache in another order and copies all of it in each step, aliased or not, so there may be rows that are not used.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dovetail_tpu.kernels.chip import in_lanes
from dovetail_tpu.kernels.kv_rows import stored_rows

IN_FLIGHT = 16
"""Copies that run at a time. One takes about a microsecond to arrive; starting one takes some ten nanoseconds."""


TILE_ROWS = 8
"""A tile's, in HBM; 2 and 4 rows tile by themselves, if they fill words of 4 bytes."""


def cache_shape(places: int, kv_heads: int, size: int, itemsize: int) -> tuple[int, int, int]:
    """Shape of a cache for so many tokens, with heads of ``size`` elements of ``itemsize`` bytes."""
    rows = max(2 * kv_heads, 4 // itemsize)
    if rows not in (2, 4):
        rows = -(-rows // TILE_ROWS) * TILE_ROWS
    return places, rows, in_lanes(size)


def kv_write(
    kv_X2NK: Array,
    k_TNK: Array,
    v_TNK: Array,
    slots_T: Array,
    *,
    page: int,
    interpret: bool | pltpu.InterpretParams = False,
) -> Array:
    """Store the keys and values of a step's tokens in place: donate ``kv_X2NK``, or the whole cache is copied.

    Args:
        kv_X2NK: of :func:`cache_shape`, in bfloat16, float32, float8_e4m3fn or int8.
        k_TNK, v_TNK: ``[T, N, K]``.
        slots_T: integers, place of each token in the cache. Those of padding tokens lie in page 0, which is left alone.
        page: tokens per page.
        interpret: execute on the host, or simulate the chip's memories there.

    Returns:
        The cache.
    """
    with jax.enable_x64(False):
        new_T2NK = interleaved(k_TNK, v_TNK, kv_X2NK)
        return pl.pallas_call(
            functools.partial(_write_kernel, page=page),
            out_shape=jax.ShapeDtypeStruct(kv_X2NK.shape, kv_X2NK.dtype),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(),
                in_specs=[pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pl.ANY)],
                out_specs=pl.BlockSpec(memory_space=pl.ANY),
                scratch_shapes=[pltpu.SemaphoreType.DMA((IN_FLIGHT,))],
            ),
            input_output_aliases={2: 0},
            interpret=interpret,
            name="kv_write",
        )(slots_T.astype(jnp.int32), new_T2NK, kv_X2NK)


def kv_scatter(kv_X2NK: Array, k_TNK: Array, v_TNK: Array, slots_T: Array) -> Array:
    """:func:`kv_write` as a scatter of XLA's, which stores padding tokens as well."""
    with jax.enable_x64(False):
        new_T2NK = interleaved(k_TNK, v_TNK, kv_X2NK)
        return kv_X2NK.at[slots_T.astype(jnp.int32)].set(new_T2NK)


def interleaved(k_TNK: Array, v_TNK: Array, kv_X2NK: Array) -> Array:
    """What the cache holds of these tokens, ``[T, rows, Kp]``."""
    tokens, kv_heads, _ = k_TNK.shape
    k_TNK, v_TNK = (stored_rows(x_TNK, kv_X2NK.dtype) for x_TNK in (k_TNK, v_TNK))
    _, rows, padded = kv_X2NK.shape
    new_T2NK = jnp.stack([k_TNK, v_TNK], axis=2).reshape(tokens, 2 * kv_heads, padded)
    return jnp.pad(new_T2NK, ((0, 0), (0, rows - 2 * kv_heads), (0, 0)))


def _write_kernel(slots_ref: Array, new_ref: Array, _: Array, kv_ref: Array, arrived: Array, *, page: int) -> None:
    """Start one copy per token, each after the one ``IN_FLIGHT`` tokens before it has arrived."""
    tokens = slots_ref.shape[0]

    def copy(token: Array) -> Any:
        places = new_ref.at[token], kv_ref.at[slots_ref[token]]
        return pltpu.make_async_copy(*places, arrived.at[lax.rem(token, IN_FLIGHT)])

    def is_stored(token: Array) -> Array:
        return (token >= 0) & (token < tokens) & (slots_ref[jnp.clip(token, 0, tokens - 1)] >= page)

    def body(token: Array, _: None) -> None:
        pl.when(is_stored(token - IN_FLIGHT))(lambda: copy(token - IN_FLIGHT).wait())
        pl.when(is_stored(token))(lambda: copy(token).start())

    lax.fori_loop(0, tokens + IN_FLIGHT, body, None)
