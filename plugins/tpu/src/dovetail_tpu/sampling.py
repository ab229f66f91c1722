"""Sampling and log-probabilities for the op table: torch's tensors in and out, kernels in between.

Keys of noise are the core's own, 64-bit integers made by torch; kernels take them as words of 32 bits.
"""

from __future__ import annotations

from functools import partial

import torch
from jax import Array
from torch import Tensor

from dovetail.ops.random import Stream, row_keys
from dovetail.ops.sampling import SamplingTensors
from dovetail_tpu import bridges
from dovetail_tpu.kernels import logprobs, sampling
from dovetail_tpu.mesh import whole


def sample(logits_SV: Tensor, params: SamplingTensors) -> Tensor:
    """See :func:`dovetail.ops.reference.sample`."""
    if params.all_greedy:
        (tokens_S,) = bridges.current().apply(_greedy, logits_SV)
    else:
        (tokens_S,) = bridges.current().apply(_sample, logits_SV, *_columns(params))
    return tokens_S.to(torch.int64)


def filter_logits(logits_SV: Tensor, params: SamplingTensors) -> Tensor:
    """See :func:`dovetail.ops.reference.filter_logits`."""
    (filtered_SV,) = bridges.current().apply(_filter_logits, logits_SV, *_columns(params))
    return filtered_SV


def sample_residual(probs_RV: Tensor, draft_probs_RV: Tensor, params: SamplingTensors) -> Tensor:
    """See :func:`dovetail.ops.reference.sample_residual`."""
    words_R2 = _words(params, Stream.RECOVER)
    (tokens_R,) = bridges.current().apply(_sample_residual, probs_RV, draft_probs_RV, words_R2)
    return tokens_R.to(torch.int64)


def top_logprobs(logits_SV: Tensor, tokens_S: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`dovetail.ops.reference.top_logprobs`."""
    logprobs_S, ranks_S, ids_SK, top_SK = bridges.current().apply(_top_logprobs, logits_SV, tokens_S, k=k)
    return logprobs_S, ranks_S.to(torch.int64), ids_SK.to(torch.int64), top_SK


def _columns(params: SamplingTensors) -> sampling.Parameters:
    return sampling.Parameters(
        temperature_S=params.temperature_S,
        top_k_S=params.top_k_S.to(torch.int32),
        top_p_S=params.top_p_S,
        min_p_S=params.min_p_S,
        words_S2=_words(params, Stream.SAMPLE),
    )


def _words(params: SamplingTensors, stream: Stream) -> Tensor:
    """The lower and the upper half of each row's key, ``[S, 2]``."""
    keys_S = row_keys(params.seeds_S, params.positions_S, stream)
    return torch.stack([_lower(keys_S), _lower(keys_S >> 32)], dim=1)


def _lower(keys_S: Tensor) -> Tensor:
    """The lower 32 bits as int32."""
    return (((keys_S + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)).to(torch.int32)


def _greedy(logits_SV: Array) -> tuple[Array]:
    return (whole(sampling.greedy)(logits_SV),)


def _sample(logits_SV: Array, *columns: Array) -> tuple[Array]:
    return (whole(sampling.sample)(logits_SV, sampling.Parameters(*columns)),)


def _filter_logits(logits_SV: Array, *columns: Array) -> tuple[Array]:
    return (whole(sampling.filter_logits)(logits_SV, sampling.Parameters(*columns)),)


def _sample_residual(probs_RV: Array, draft_probs_RV: Array, words_R2: Array) -> tuple[Array]:
    return (whole(sampling.sample_residual)(probs_RV, draft_probs_RV, words_R2),)


def _top_logprobs(logits_SV: Array, tokens_S: Array, *, k: int) -> tuple[Array, ...]:
    scores: tuple[Array, ...] = whole(partial(logprobs.top_logprobs, k=k))(logits_SV, tokens_S)
    return scores
