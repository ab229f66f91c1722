"""Paged attention in plain XLA: each query gathers all pages of its request. Slow, and easy to see through."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from dovetail_tpu.kernels.kv_rows import read_rows

AT_A_TIME = 16
"""Queries. Their gathered contexts are in memory together."""


def gather_attention(
    q_THK: Array,
    kv_X2NK: Array,
    table_RB: Array,
    starts_R1: Array,
    lengths_R: Array,
    *,
    kv_heads: int,
    page: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Array:
    """See :func:`dovetail_tpu.kernels.ragged_attention.ragged_attention`, which computes the same."""
    with jax.enable_x64(False), jax.default_matmul_precision("highest"):
        tokens, heads, size = q_THK.shape
        pages_RBP = kv_X2NK.reshape(-1, page, *kv_X2NK.shape[1:])
        table_RB, starts_R1, lengths_R = (x.astype(jnp.int32) for x in (table_RB, starts_R1, lengths_R))
        keys_L = jnp.arange(table_RB.shape[1] * page, dtype=jnp.int32)

        def attend(token: Array, q_HK: Array) -> Array:
            request = jnp.searchsorted(starts_R1, token, side="right", method="compare_all") - 1
            is_real = request < len(lengths_R)
            request = jnp.minimum(request, len(lengths_R) - 1)
            position = lengths_R[request] - starts_R1[request + 1] + token
            sees_L = is_real & (keys_L <= position) & (keys_L > position - (window or keys_L.size))
            rows_L2NK = pages_RBP[table_RB[request], :, : 2 * kv_heads].reshape(keys_L.size, 2 * kv_heads, -1)
            kv_L2NK = read_rows(rows_L2NK)[..., :size]
            # zeros where nothing is seen: a weight of 0 would not hide infinities and NaN
            kv_L2NK = jnp.where(sees_L[:, None, None], kv_L2NK, 0.0)
            q_NGK = q_HK.astype(jnp.float32).reshape(kv_heads, -1, size)
            scores_NGL = jnp.einsum("ngk,lnk->ngl", q_NGK, kv_L2NK[:, 0::2]) * scale
            if soft_cap is not None:
                scores_NGL = soft_cap * jnp.tanh(scores_NGL / soft_cap)
            weights_NGL = jax.nn.softmax(scores_NGL, axis=-1, where=sees_L)
            out_NGK = jnp.einsum("ngl,lnk->ngk", weights_NGL, kv_L2NK[:, 1::2])
            return jnp.where(is_real, out_NGK.reshape(heads, size), 0.0).astype(q_THK.dtype)

        return lax.map(lambda x: attend(*x), (jnp.arange(tokens, dtype=jnp.int32), q_THK), batch_size=AT_A_TIME)
