"""Log-probabilities of a token, its rank, and the most likely tokens of each row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from dovetail_tpu.kernels.threshold import ordered

_BELOW_ALL = -0x80000000


def top_logprobs(logits_SV: Array, tokens_S: Array, k: int) -> tuple[Array, Array, Array, Array]:
    """See ``dovetail.ops.reference.top_logprobs``; integers are int32."""
    with jax.enable_x64(False):
        logits_SV, place_S1 = logits_SV.astype(jnp.float32), tokens_S.astype(jnp.int32)[:, None]
        chosen_S1 = jnp.take_along_axis(logits_SV, place_S1, axis=1)
        ranks_S = jnp.sum(logits_SV > chosen_S1, axis=1, dtype=jnp.int32) + 1
        ids_SK = _largest(ordered(logits_SV), k)
        total_S1 = jax.nn.logsumexp(logits_SV, axis=1, keepdims=True)
        top_SK = jnp.take_along_axis(logits_SV, ids_SK, axis=1) - total_S1
        return (chosen_S1 - total_S1)[:, 0], ranks_S, ids_SK, top_SK


def _largest(keys_SV: Array, k: int) -> Array:
    """Columns of the ``k`` largest keys of each row, equals in order, one after the other: the compiler would sort
    whole rows for them.
    """
    columns_V = jnp.arange(keys_SV.shape[1], dtype=jnp.int32)

    def find(last: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        last_key_S1, last_id_S1 = last
        is_left_SV = (keys_SV < last_key_S1) | ((keys_SV == last_key_S1) & (columns_V > last_id_S1))
        left_SV = jnp.where(is_left_SV, keys_SV, _BELOW_ALL)
        id_S1 = jnp.argmax(left_SV, axis=1, keepdims=True)
        return (jnp.max(left_SV, axis=1, keepdims=True), id_S1), id_S1[:, 0]

    first = jnp.full((len(keys_SV), 1), jnp.iinfo(jnp.int32).max), jnp.full((len(keys_SV), 1), -1)
    return lax.scan(find, first, length=k)[1].T
