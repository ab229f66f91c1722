"""From logits to tokens, as the core defines it (``dovetail.ops.sampling``): temperature, min-p, top-k, top-p, then
Gumbel-max. All shapes are static, and nothing is sorted: the lowest logit that a row keeps is found by bisection.

Work that no row of a step needs is skipped on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from dovetail_tpu.kernels.noise import gumbel
from dovetail_tpu.kernels.threshold import kth_largest, last_reaching, number, ordered


class Parameters(NamedTuple):
    """How to sample each row.

    Attributes:
        temperature_S: float32; 0 is greedy.
        top_k_S: integers; 0 keeps all.
        top_p_S, min_p_S: float32; 1 and 0 keep all.
        words_S2: int32: the lower and the upper half of each row's key of noise.
    """

    temperature_S: Array
    top_k_S: Array
    top_p_S: Array
    min_p_S: Array
    words_S2: Array


def greedy(logits_SV: Array) -> Array:
    """The first of the largest logits of each row, or its first NaN; int32 ``[S]``."""
    with jax.enable_x64(False):
        return jnp.argmax(logits_SV, axis=1)


def sample(logits_SV: Array, params: Parameters) -> Array:
    """One token per row, int32 ``[S]``.

    Of rows with NaN or without a finite logit it is one whose logit is not finite.
    """
    with jax.enable_x64(False):
        best_S, is_greedy_S = greedy(logits_SV), params.temperature_S == 0

        def draw() -> Array:
            return _gumbel_max(filter_logits(logits_SV, params), params.words_S2)

        drawn_S = lax.cond(jnp.all(is_greedy_S), lambda: best_S, draw)
        return jnp.where(is_greedy_S, best_S, drawn_S)


def filter_logits(logits_SV: Array, params: Parameters) -> Array:
    """Logits over temperature, with ``-inf`` for what filters drop; float32. Greedy rows are only converted."""
    with jax.enable_x64(False):
        is_greedy_S = params.temperature_S == 0
        scaled_SV = logits_SV.astype(jnp.float32) / jnp.where(is_greedy_S, 1.0, params.temperature_S)[:, None]
        is_filtered_S = ~is_greedy_S & ((params.top_k_S > 0) | (params.top_p_S < 1) | (params.min_p_S > 0))

        def filtered() -> Array:
            floors_S1 = jnp.where(is_filtered_S[:, None], _floors(scaled_SV, params), -jnp.inf)
            return jnp.where(scaled_SV < floors_S1, -jnp.inf, scaled_SV)

        return lax.cond(jnp.any(is_filtered_S), filtered, lambda: scaled_SV)


def sample_residual(probs_RV: Array, draft_probs_RV: Array, words_R2: Array) -> Array:
    """Draw from what is left of ``p`` over ``q``, or from ``p`` where nothing is left.

    Args:
        probs_RV, draft_probs_RV: float32.
        words_R2: int32, halves of the keys of noise.

    Returns:
        int32 ``[R]``.
    """
    with jax.enable_x64(False):
        left_RV = jnp.maximum(probs_RV - draft_probs_RV, 0.0)
        left_RV = jnp.where(jnp.max(left_RV, axis=1, keepdims=True) > 0, left_RV, probs_RV)
        return _gumbel_max(jnp.log(left_RV), words_R2)


def _gumbel_max(scores_SV: Array, words_S2: Array) -> Array:
    columns_V = jnp.arange(scores_SV.shape[1], dtype=jnp.int32)
    return jnp.argmax(scores_SV + gumbel(words_S2, columns_V), axis=1)


def _floors(scaled_SV: Array, params: Parameters) -> Array:
    """The lowest scaled logit that each row keeps, ``[S, 1]``; tokens tied with it are kept too."""
    keys_SV, largest_S1 = ordered(scaled_SV), jnp.max(scaled_SV, axis=1, keepdims=True)
    top_k_S, top_p_S1, min_p_S1 = params.top_k_S, params.top_p_S[:, None], params.min_p_S[:, None]
    nothing_S1 = jnp.full_like(largest_S1, -jnp.inf)
    kth_S1 = lax.cond(
        jnp.any(top_k_S > 0), lambda: number(kth_largest(keys_SV, jnp.maximum(top_k_S, 1))), lambda: nothing_S1
    )
    outer_S1 = jnp.where(top_k_S[:, None] > 0, kth_S1, nothing_S1)
    outer_S1 = jnp.maximum(outer_S1, largest_S1 + jnp.log(min_p_S1))

    def inner() -> Array:
        # of what top-k and min-p left, renormalised
        weights_SV = jnp.where(scaled_SV >= outer_S1, jnp.exp(scaled_SV - largest_S1), 0.0)
        amount_S1 = top_p_S1 * jnp.sum(weights_SV, axis=1, keepdims=True)
        return jnp.minimum(number(last_reaching(keys_SV, weights_SV, amount_S1)), largest_S1)

    inner_S1 = lax.cond(jnp.any(top_p_S1 < 1), inner, lambda: nothing_S1)
    return jnp.where(top_p_S1 < 1, jnp.maximum(outer_S1, inner_S1), outer_S1)
