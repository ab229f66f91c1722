"""Verification of draft tokens: the output is distributed exactly as if every token had been sampled from the
model.

Greedy requests keep the drafts that equal the model's own choices, so their tokens are those of plain greedy
decoding. Others use rejection sampling (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023,
arXiv:2302.01318): a draft drawn from ``q`` is accepted with probability ``min(1, p / q)``; the first one
rejected is replaced by a draw from ``(p - q)⁺``, normalised; when all are accepted, one more token is drawn
from ``p``. Here ``p`` is the model's distribution after every filter of the request. Acceptance, recovery and
that last draw use separate streams of stateless noise, so a step can be repeated; the last draw's noise is
that of ordinary sampling, so a request without drafts gets its ordinary token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dovetail.contracts.specdec import Drafts
from dovetail.ops.random import Stream, gumbel, row_keys, uniform
from dovetail.ops.sampling import SamplingTensors, filter_logits
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


def verify(
    logits_SV: Tensor, params: SamplingTensors, rows: SampleRows, draft_probs_SV: Tensor | None = None
) -> Tensor:
    """Decide which drafts stay, and choose the token after them.

    Args:
        logits_SV: one row per draft and one more, for each request; bias, masks and penalties applied.
        params: one entry per row.
        rows: which rows belong to which request, and their drafts.
        draft_probs_SV: the distribution each row's draft was drawn from; None for deterministic drafts. Rows
            without a draft are ignored.

    Returns:
        int64 ``[R, 1 + most drafts]``: accepted drafts, then one token (or ``POISONED``), then ``NO_TOKEN``.
    """
    device = logits_SV.device
    drafts_S = torch.from_numpy(rows.drafts_S).to(device)
    starts_R1 = torch.from_numpy(rows.starts_R).to(device).unsqueeze(1)
    target = _Target(logits_SV, params, drafts_S, draft_probs_SV)
    columns_K = torch.arange(rows.max_drafts + 1, device=device)
    # A request's last row has no draft and accepts nothing, so reading on into the next request does no harm.
    rows_RK = (starts_R1 + columns_K).clamp(max=len(drafts_S) - 1)
    accepted_R1 = target.accepted()[rows_RK].to(torch.int64).cumprod(1).sum(1, keepdim=True)
    tokens_RK = torch.where(columns_K < accepted_R1, drafts_S[rows_RK], NO_TOKEN)
    return tokens_RK.scatter_(1, accepted_R1, target.draw((starts_R1 + accepted_R1).squeeze(1)).unsqueeze(1))


class _Target:
    """The model's distribution at each row, and the two decisions it is asked for."""

    def __init__(
        self, logits_SV: Tensor, params: SamplingTensors, drafts_S: Tensor, draft_probs_SV: Tensor | None
    ) -> None:
        self._logits_SV = logits_SV
        self._params = params
        self._drafts_S = drafts_S
        self._draft_probs_SV = draft_probs_SV
        self._sound_S = logits_SV.amax(-1).isfinite()
        self._choice_S = logits_SV.argmax(-1)
        if not params.all_greedy:
            self._filtered_SV = filter_logits(logits_SV, params)
            self._probs_SV = self._filtered_SV.softmax(-1)

    def accepted(self) -> Tensor:
        """Whether each row's draft is accepted, bool ``[S]``; False on rows without a draft."""
        accepted_S = self._choice_S == self._drafts_S
        if not self._params.all_greedy:
            accepted_S = torch.where(self._params.is_greedy, accepted_S, self._survives())
        return accepted_S & self._sound_S & (self._drafts_S != NO_TOKEN)

    def draw(self, rows: Tensor) -> Tensor:
        """The token to emit at each of the given rows, where drafts ended."""
        tokens = self._choice_S[rows]
        if not self._params.all_greedy:
            tokens = torch.where(self._params.is_greedy[rows], tokens, self._recover(rows))
        return torch.where(self._sound_S[rows], tokens, POISONED)

    def _survives(self) -> Tensor:
        """Accept with probability ``min(1, p / q)``: ``u × q < p`` for u in (0, 1)."""
        drafts_S1 = self._drafts_S.clamp(min=0).unsqueeze(1)
        keys_S = row_keys(self._params.seeds_S, self._params.positions_S, Stream.ACCEPT)
        threshold_S1 = uniform(keys_S, torch.zeros(1, dtype=torch.int64, device=keys_S.device))
        if self._draft_probs_SV is not None:
            threshold_S1 = threshold_S1 * self._draft_probs_SV.gather(1, drafts_S1)
        return (threshold_S1 < self._probs_SV.gather(1, drafts_S1)).squeeze(1)

    def _recover(self, rows: Tensor) -> Tensor:
        """Draw from ``(p - q)⁺`` where a draft was rejected, from ``p`` where there was none."""
        params = self._params.rows(rows)
        drafts_R1 = self._drafts_S[rows].unsqueeze(1)
        probs_RV = self._probs_SV[rows]
        if self._draft_probs_SV is None:
            residual_RV = probs_RV.scatter(1, drafts_R1.clamp(min=0), 0.0)
        else:
            residual_RV = (probs_RV - self._draft_probs_SV[rows]).clamp_(min=0)
        # Where p equals q up to rounding, nothing is left although a rejection happened by a hair: p itself
        # is right.
        recovers_R1 = (drafts_R1 != NO_TOKEN) & (residual_RV.amax(-1, keepdim=True) > 0)
        scores_RV = torch.where(recovers_R1, residual_RV.log(), self._filtered_SV[rows])
        recover_R = row_keys(params.seeds_S, params.positions_S, Stream.RECOVER)
        sample_R = row_keys(params.seeds_S, params.positions_S, Stream.SAMPLE)
        keys_R = torch.where(drafts_R1.squeeze(1) != NO_TOKEN, recover_R, sample_R)
        columns_V = torch.arange(scores_RV.shape[1], device=rows.device)
        return gumbel(keys_R, columns_V).add_(scores_RV).argmax(-1)
