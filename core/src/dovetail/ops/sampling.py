"""From logits to tokens: temperature, min-p, top-k, top-p, Gumbel-max. Every row is treated by itself.

A filter is a floor: tokens whose logit is at or above it are kept, so tokens tied with the last one kept are
kept too, and the outcome does not depend on how a sort orders equals. Floors are found among the most likely
tokens alone, a candidate set that grows until it provably holds every token that is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dovetail.ops.random import Stream, gumbel, row_keys

FIRST_CANDIDATES = 64
"""Candidates per row to begin with; most real distributions reach their top-p within them."""

GROWTH = 8
"""How much the candidate set grows for rows that need more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingTensors:
    """Sampling parameters of a step, one entry per row of logits, on the device.

    Attributes:
        temperature_S: float32; 0 is greedy.
        top_k_S: int64; 0 keeps all.
        top_p_S, min_p_S: float32; 1 and 0 keep all.
        seeds_S: int64.
        positions_S: int64 index, in its request, of the token to choose.
        all_greedy: known on the host: every temperature is 0. The tensors may then be empty; nothing reads them.
        any_filter: known on the host: a row that is not greedy has a top-k, top-p or min-p that may drop
            tokens.
    """

    temperature_S: Tensor
    top_k_S: Tensor
    top_p_S: Tensor
    min_p_S: Tensor
    seeds_S: Tensor
    positions_S: Tensor
    all_greedy: bool
    any_filter: bool

    def rows(self, rows: Tensor) -> SamplingTensors:
        """The parameters of the given rows, in that order."""
        columns = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name.endswith("_S")}
        return replace(self, **columns)

    @property
    def is_greedy(self) -> Tensor:
        """Whether each row takes its most likely token."""
        return self.temperature_S == 0

    @property
    def is_filtered(self) -> Tensor:
        """Whether each row has a filter that may drop tokens."""
        return (self.top_k_S > 0) | (self.top_p_S < 1) | (self.min_p_S > 0)


_NO_FLOAT, _NO_INTEGER = torch.empty(0), torch.empty(0, dtype=torch.int64)
ALL_GREEDY = SamplingTensors(
    temperature_S=_NO_FLOAT,
    top_k_S=_NO_INTEGER,
    top_p_S=_NO_FLOAT,
    min_p_S=_NO_FLOAT,
    seeds_S=_NO_INTEGER,
    positions_S=_NO_INTEGER,
    all_greedy=True,
    any_filter=False,
)
"""Parameters of any number of greedy rows: nothing else is read."""


def sample_tokens(logits_SV: Tensor, params: SamplingTensors) -> Tensor:
    """See :func:`dovetail.ops.reference.sample`."""
    if params.all_greedy:
        return logits_SV.argmax(-1)
    greedy_S, filtered_S = params.is_greedy, params.is_filtered
    parts: tuple[tuple[Tensor, Callable[[Tensor, SamplingTensors], Tensor]], ...] = (
        (greedy_S, lambda logits_SV, _: logits_SV.argmax(-1)),
        (~greedy_S & ~filtered_S, _sample_unfiltered),
        (~greedy_S & filtered_S, _sample_filtered),
    )
    tokens_S = torch.empty(len(logits_SV), dtype=torch.int64, device=logits_SV.device)
    for chosen_S, sample in parts:
        rows = chosen_S.nonzero().squeeze(1)
        if len(rows) == len(logits_SV):
            return sample(logits_SV, params)
        if len(rows):
            tokens_S[rows] = sample(logits_SV[rows], params.rows(rows))
    return tokens_S


def scale_logits(logits_SV: Tensor, params: SamplingTensors) -> Tensor:
    """Logits over temperature, a new float32 tensor; greedy rows are only converted."""
    temperature_S = torch.where(params.is_greedy, 1.0, params.temperature_S)
    return logits_SV.to(torch.float32) / temperature_S.unsqueeze(1)


def filter_logits(logits_SV: Tensor, params: SamplingTensors) -> Tensor:
    """Scaled logits, with ``-inf`` for every token that min-p, top-k or top-p drops.

    The softmax of the result is the distribution that :func:`sample_tokens` draws from, for rows that are not
    greedy.
    """
    scaled_SV = scale_logits(logits_SV, params)
    if params.any_filter:
        rows = (params.is_filtered & ~params.is_greedy).nonzero().squeeze(1)
        if not len(rows):
            return scaled_SV
        floors_S1 = torch.full_like(scaled_SV[:, :1], -torch.inf)
        for found in _find_candidates(scaled_SV[rows], params.rows(rows)):
            floors_S1[rows[found.rows]] = found.floors_S1
        scaled_SV.masked_fill_(scaled_SV < floors_S1, -torch.inf)
    return scaled_SV


def sample_residual(probs_RV: Tensor, draft_probs_RV: Tensor, params: SamplingTensors) -> Tensor:
    """See :func:`dovetail.ops.reference.sample_residual`."""
    residual_RV = (probs_RV - draft_probs_RV).clamp_(min=0)
    # Where p equals q up to rounding, nothing is left although a rejection happened by a hair: p itself is right.
    residual_RV = torch.where(residual_RV.amax(-1, keepdim=True) > 0, residual_RV, probs_RV)
    keys_R = row_keys(params.seeds_S, params.positions_S, Stream.RECOVER)
    columns_V = torch.arange(residual_RV.shape[1], device=residual_RV.device)
    return gumbel(keys_R, columns_V).add_(residual_RV.log()).argmax(-1)


def _sample_unfiltered(logits_SV: Tensor, params: SamplingTensors) -> Tensor:
    keys_S = row_keys(params.seeds_S, params.positions_S, Stream.SAMPLE)
    noise_SV = gumbel(keys_S, torch.arange(logits_SV.shape[1], device=logits_SV.device))
    return noise_SV.add_(scale_logits(logits_SV, params)).argmax(-1)


def _sample_filtered(logits_SV: Tensor, params: SamplingTensors) -> Tensor:
    """Draw among the candidates alone. Noise belongs to the token, so the outcome is the whole row's."""
    keys_S = row_keys(params.seeds_S, params.positions_S, Stream.SAMPLE)
    tokens_S = torch.empty(len(logits_SV), dtype=torch.int64, device=logits_SV.device)
    for rows, logits_SK, ids_SK, floors_S1 in _find_candidates(scale_logits(logits_SV, params), params):
        scores_SK = gumbel(keys_S[rows], ids_SK).add_(logits_SK)
        scores_SK.masked_fill_(logits_SK < floors_S1, -torch.inf)
        best_S1 = scores_SK.amax(-1, keepdim=True)
        # NaN equals nothing: a poisoned row keeps its first candidate, which is the NaN itself.
        winners_SK = ids_SK.masked_fill(scores_SK != best_S1, logits_SV.shape[1])
        tokens_S[rows] = torch.where(best_S1.isnan(), ids_SK[:, :1], winners_SK).amin(-1)
    return tokens_S


class _Candidates(NamedTuple):
    """Rows whose filters are settled, their most likely tokens, descending, and the lowest logit kept."""

    rows: Tensor
    logits_SK: Tensor
    ids_SK: Tensor
    floors_S1: Tensor


def _find_candidates(scaled_SV: Tensor, params: SamplingTensors) -> Iterator[_Candidates]:
    """Every row once, each with a candidate set that holds all tokens it keeps."""
    vocab_size = scaled_SV.shape[1]
    rows = torch.arange(len(scaled_SV), device=scaled_SV.device)
    # exp(logit - max) of the whole row sums to 1 / max probability. The softmax kernel works row by row, so
    # the value does not depend on the batch, unlike that of a plain sum.
    total_S1 = scaled_SV.softmax(-1).amax(-1, keepdim=True).reciprocal()
    size = max(FIRST_CANDIDATES, 2 * int(params.top_k_S.clamp(max=vocab_size).max()))
    while len(rows):
        size = min(size, vocab_size)
        logits_SK, ids_SK = (scaled_SV if len(rows) == len(scaled_SV) else scaled_SV[rows]).topk(size)
        floors_S1, settled_S = _floors(logits_SK, total_S1[rows], params.rows(rows))
        if size == vocab_size:
            settled_S.fill_(True)
        yield _Candidates(rows[settled_S], logits_SK[settled_S], ids_SK[settled_S], floors_S1[settled_S])
        rows = rows[~settled_S]
        size *= GROWTH


def _floors(logits_SK: Tensor, total_S1: Tensor, params: SamplingTensors) -> tuple[Tensor, Tensor]:
    """The lowest logit that each row keeps, and whether the candidates suffice to know.

    Args:
        logits_SK: the row's largest scaled logits, descending.
        total_S1: sum of ``exp(logit - largest logit)`` over the whole row.

    Returns:
        ``[S, 1]`` and bool ``[S]``.
    """
    size = logits_SK.shape[1]
    largest_S1, smallest_S1 = logits_SK[:, :1], logits_SK[:, -1:]
    top_p_S1 = params.top_p_S.unsqueeze(1)
    kth_S1 = logits_SK.gather(1, params.top_k_S.sub(1).clamp(0, size - 1).unsqueeze(1))
    outer_S1 = torch.where(params.top_k_S.unsqueeze(1) > 0, kth_S1, -torch.inf)
    outer_S1 = torch.maximum(outer_S1, largest_S1 + params.min_p_S.log().unsqueeze(1))
    # Top-p works on what min-p and top-k left, renormalised: the first token at which the sum reaches p is
    # the last kept.
    sums_SK = (logits_SK - largest_S1).exp_().cumsum(-1)
    kept_S1 = (logits_SK >= outer_S1).sum(-1, keepdim=True)
    total_S1 = torch.where(outer_S1 == -torch.inf, total_S1, sums_SK.gather(1, kept_S1.sub(1).clamp(min=0)))
    before_S1 = (sums_SK < top_p_S1 * total_S1).sum(-1, keepdim=True)
    inner_S1 = logits_SK.gather(1, before_S1.clamp(max=size - 1))
    floors_S1 = torch.where((top_p_S1 < 1) & (before_S1 < size), torch.maximum(outer_S1, inner_S1), outer_S1)
    outer_known_S1 = (smallest_S1 < outer_S1) | (outer_S1 == -torch.inf)
    settled_S1 = (outer_known_S1 & (smallest_S1 < floors_S1)) | (smallest_S1 == -torch.inf)
    return floors_S1, settled_S1.squeeze(1)
