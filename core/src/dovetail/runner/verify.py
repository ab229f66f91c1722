"""Verification of draft tokens: speculation never changes what is sampled.

*Coupling*, for drafts that come without probabilities: at every row the token is drawn that ordinary sampling would
draw there, with the same noise. Drafts stay as long as they equal it, and the first that differs is replaced by it. So
a request's tokens are the same with and without speculation, whoever drafts, greedy or sampled; a draft is accepted
with the probability that the model gives it, as by rejection sampling. A drafter that draws with the same noise from a
similar distribution mostly draws the same token (Gumbel coupling: Daliri, Musco and Suresh 2024, "Coupling without
Communication and Drafter-Invariant Speculative Decoding", arXiv:2408.07978).

*Rejection sampling*, for drafts with the probabilities ``q`` that they were drawn with (Leviathan et al. 2023,
arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318): a draft is accepted with probability ``min(1, p / q)``; the first
one rejected is replaced by a draw from ``(p - q)⁺``, normalised; when all are accepted, one more token is drawn from
``p``. Here ``p`` is the model's distribution after every filter of the request. More drafts are accepted, and tokens
have the right distribution, but they are others than without speculation. Acceptance and recovery use streams of
stateless noise of their own, so a step can be repeated; that last draw is ordinary sampling's. Greedy requests are
coupled all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.contracts.specdec import Drafts
from dovetail.ops.random import Stream, row_keys, uniform
from dovetail.ops.sampling import SamplingTensors
from dovetail.runner.sample_rows import NO_TOKEN, SampleRows

POISONED = -2
"""Stands for the token that could not be chosen, because no logit is finite or one is NaN."""


@dataclass(frozen=True, slots=True)
class DraftProbs:
    """The distributions that drafts were drawn from, until the step that verifies them.

    Attributes:
        entries: slot -> its entry in ``probs``.
        probs: ``[entries, drafts, V]``.
    """

    entries: dict[int, int]
    probs: Tensor

    @classmethod
    def of(cls, slots: Sequence[int], proposal: Drafts) -> DraftProbs | None:
        """What to keep of a proposal for these slots; None if its drafts are deterministic."""
        if proposal.probs is None:
            return None
        return cls({slot: entry for entry, slot in enumerate(slots)}, proposal.probs)

    def gather(self, rows: SampleRows) -> Tensor:
        """``[S, V]``: the distribution behind each row's draft; on a request's last row an arbitrary one."""
        counts = [len(drafts) + 1 for drafts in rows.drafts]
        entries = np.repeat([self.entries.get(slot, 0) for slot in rows.slots_R.tolist()], counts)
        offsets = np.arange(len(rows.slots_S)) - np.repeat(rows.starts_R, counts)
        offsets[rows.drafts_S == NO_TOKEN] = 0
        device = self.probs.device
        return self.probs[torch.from_numpy(entries).to(device), torch.from_numpy(offsets).to(device)]


@dataclass(frozen=True, slots=True)
class DraftRows:
    """The drafts of a step, on the device.

    Attributes:
        starts_R: int64 first row of each request.
        drafts_S: int64 draft at each row, ``NO_TOKEN`` on a request's last.
        most: of one request.
    """

    starts_R: Tensor
    drafts_S: Tensor
    most: int

    @classmethod
    def of(cls, rows: SampleRows, most: int, device: torch.device) -> DraftRows:
        """Those of these rows."""
        return cls(torch.from_numpy(rows.starts_R).to(device), torch.from_numpy(rows.drafts_S).to(device), most)


def verify(tokens_S: Tensor, rows: DraftRows) -> Tensor:
    """Keep the drafts that ordinary sampling chooses as well.

    Args:
        tokens_S: the token that ordinary sampling chooses at each row, or ``POISONED``; one row per draft and one
            more, for each request.
        rows: which rows belong to which request, and their drafts.

    Returns:
        int64 ``[R, 1 + most drafts]``: accepted drafts, then one token (or ``POISONED``), then ``NO_TOKEN``.
    """
    return _emit(rows, tokens_S == rows.drafts_S, lambda ends_R: tokens_S[ends_R])


def verify_drawn(
    tokens_S: Tensor,
    rows: DraftRows,
    logits_SV: Tensor,
    params: SamplingTensors,
    draft_probs_SV: Tensor,
    ops: OpTable,
) -> Tensor:
    """Keep drafts by rejection sampling.

    Args:
        tokens_S, rows: as for :func:`verify`.
        logits_SV: bias, masks and penalties applied.
        params: one entry per row.
        draft_probs_SV: the distribution each row's draft was drawn from. Rows without a draft are ignored.

    Returns:
        As :func:`verify`.
    """
    drafts_S = rows.drafts_S
    probs_SV = ops.filter_logits(logits_SV, params).softmax(-1)
    survives_S = _survives(probs_SV, params, drafts_S, draft_probs_SV) & (tokens_S != POISONED)
    accepted_S = torch.where(params.is_greedy, tokens_S == drafts_S, survives_S & (drafts_S != NO_TOKEN))

    def draw(ends_R: Tensor) -> Tensor:
        recovered_R = ops.sample_residual(probs_SV[ends_R], draft_probs_SV[ends_R], params.rows(ends_R))
        ordinary_R = params.is_greedy[ends_R] | (drafts_S[ends_R] == NO_TOKEN) | (tokens_S[ends_R] == POISONED)
        return torch.where(ordinary_R, tokens_S[ends_R], recovered_R)

    return _emit(rows, accepted_S, draw)


def _emit(rows: DraftRows, accepted_S: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """Each request's drafts up to the first that is not accepted, and what ``draw`` puts at the row where they end."""
    starts_R1, drafts_S = rows.starts_R.unsqueeze(1), rows.drafts_S
    columns_K = torch.arange(rows.most + 1, device=drafts_S.device)
    # A request's last row has no draft and accepts nothing, so reading on into the next request does no harm.
    rows_RK = (starts_R1 + columns_K).clamp(max=len(drafts_S) - 1)
    accepted_R1 = accepted_S[rows_RK].to(torch.int64).cumprod(1).sum(1, keepdim=True)
    tokens_RK = torch.where(columns_K < accepted_R1, drafts_S[rows_RK], NO_TOKEN)
    return tokens_RK.scatter_(1, accepted_R1, draw((starts_R1 + accepted_R1).squeeze(1)).unsqueeze(1))


def _survives(probs_SV: Tensor, params: SamplingTensors, drafts_S: Tensor, draft_probs_SV: Tensor) -> Tensor:
    """Accept with probability ``min(1, p / q)``: ``u × q < p`` for u in (0, 1)."""
    drafts_S1 = drafts_S.clamp(min=0).unsqueeze(1)
    keys_S = row_keys(params.seeds_S, params.positions_S, Stream.ACCEPT)
    uniform_S1 = uniform(keys_S, torch.zeros(1, dtype=torch.int64, device=keys_S.device))
    return (uniform_S1 * draft_probs_SV.gather(1, drafts_S1) < probs_SV.gather(1, drafts_S1)).squeeze(1)
