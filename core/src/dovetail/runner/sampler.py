"""Sampler: turns a step's logits into tokens and log-probabilities.

Order: bias, allowed tokens, min_tokens, penalties, temperature, min-p, top-k, top-p, then a draw with noise
that depends on (request seed, position) alone. Work that no request of a step needs is left out, decided by
flags on the host; a request's tokens never depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.messages import NewRow, StepPlan, TokenLogprobs
from dovetail.ops.sampling import ALL_GREEDY
from dovetail.runner.logit_rules import LogitRules
from dovetail.runner.logprobs import token_logprobs
from dovetail.runner.sample_rows import NO_TOKEN, SampleRows
from dovetail.runner.sampling_table import SamplingTable
from dovetail.runner.verify import POISONED, DraftProbs, verify, verify_drawn

NOT_ASKED = -1
ALL_FORBIDDEN = "No token can be chosen: allowed_token_ids holds only tokens that min_tokens still forbids."
NOT_FINITE = "The model's logits for this request are not finite numbers (NaN or infinity)."


@dataclass(frozen=True, slots=True)
class SampledStep:
    """A step's tokens; columns match ``StepPlan.slots``.

    Attributes:
        token_ids: none for requests that do not sample yet, else accepted drafts plus one.
        logprobs: one entry per token, for requests that asked.
        errors: column -> why that request cannot go on; it has no tokens. The others are unharmed.
    """

    token_ids: list[list[int]]
    logprobs: list[list[TokenLogprobs] | None]
    errors: dict[int, str] = field(default_factory=dict)


class Sampler:
    """Samples for every request in a slot."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device, ops: OpTable) -> None:
        self._device = device
        self._ops = ops
        self._table = SamplingTable(max_num_seqs, vocab_size, device)
        self._rules = LogitRules(max_num_seqs, vocab_size, device)
        self._plain = np.zeros(max_num_seqs, dtype=bool)
        self._num_logprobs = np.full(max_num_seqs, NOT_ASKED)
        self._num_prompt_logprobs = np.full(max_num_seqs, NOT_ASKED)

    def enter(self, row: NewRow) -> None:
        """A request replaces the one before it in a slot. Its parameters name tokens of the vocabulary only."""
        self._table.enter(row)
        self._rules.enter(row)
        asked, prompt_asked = row.params.logprobs, row.params.prompt_logprobs
        self._plain[row.slot] = asked is None and self._table.is_greedy(row.slot) and not self._rules.any_for(row.slot)
        self._num_logprobs[row.slot] = NOT_ASKED if asked is None else asked
        self._num_prompt_logprobs[row.slot] = NOT_ASKED if prompt_asked is None else prompt_asked

    def step(self, plan: StepPlan, logits_SV: Tensor, draft_probs: DraftProbs | None = None) -> SampledStep:
        """Sample, or verify drafts, for every request of the plan that samples.

        Args:
            plan: the step.
            logits_SV: raw logits, rows in the plan's order: one per draft and one more for each request that
                samples.
            draft_probs: what the plan's drafts were drawn from; None if they are deterministic.
        """
        if self._plain[plan.slots].all() and not any(plan.drafts):
            sampled = self._largest(plan, logits_SV)
            if sampled is not None:
                return sampled
        rows = SampleRows.of(plan)
        sampled = SampledStep([[] for _ in plan.slots], [None] * len(plan.slots))
        if not rows.columns:
            return sampled
        for column, tokens in zip(rows.columns, self._choose(rows, logits_SV, draft_probs), strict=True):
            sampled.token_ids[column] = tokens
        self._take_out_poisoned(rows, logits_SV, sampled)
        token_ids = [sampled.token_ids[column] for column in rows.columns]
        self._rules.observe(rows.slots_R.tolist(), token_ids)
        self._report(rows, logits_SV, sampled)
        return sampled

    def _largest(self, plan: StepPlan, logits_SV: Tensor) -> SampledStep | None:
        """The short way for requests that just take the largest logit; None if one of those is not finite.

        Right after a step the caches hold weights, not this code: every operation left out here counts.
        """
        tokens_S = self._ops.sample(logits_SV, ALL_GREEDY)
        finite_S = logits_SV.gather(1, tokens_S.unsqueeze(1)).isfinite().squeeze(1)
        chosen = torch.where(finite_S, tokens_S, POISONED).tolist()  # the only wait for the device
        if POISONED in chosen:
            return None
        tokens = iter(chosen)
        token_ids = [[next(tokens)] if samples else [] for samples in plan.samples]
        return SampledStep(token_ids, [None] * len(token_ids))

    def prompt_logprobs(self, slot: int, logits_SV: Tensor, targets_S: Tensor) -> list[TokenLogprobs]:
        """Log-probabilities of prompt tokens, given the logits that predict them."""
        return token_logprobs(logits_SV, targets_S, [int(self._num_prompt_logprobs[slot])] * len(targets_S))

    def _choose(self, rows: SampleRows, logits_SV: Tensor, draft_probs: DraftProbs | None) -> list[list[int]]:
        logits_SV = self._rules.apply(logits_SV, rows)
        params = self._table.gather(rows)
        tokens_S1 = self._ops.sample(logits_SV, params).unsqueeze(1)
        tokens_S1 = torch.where(logits_SV.gather(1, tokens_S1).isfinite(), tokens_S1, POISONED)
        if not rows.has_drafts:
            token_ids: list[list[int]] = tokens_S1.tolist()
            return token_ids
        if draft_probs is None or params.all_greedy:
            tokens_RK = verify(tokens_S1.squeeze(1), rows)
        else:
            tokens_RK = verify_drawn(tokens_S1.squeeze(1), rows, logits_SV, params, draft_probs.gather(rows))
        return [[token for token in tokens if token != NO_TOKEN] for tokens in tokens_RK.tolist()]

    def _take_out_poisoned(self, rows: SampleRows, logits_SV: Tensor, sampled: SampledStep) -> None:
        for column, start in zip(rows.columns, rows.starts_R.tolist(), strict=True):
            tokens = sampled.token_ids[column]
            if tokens[-1] == POISONED:
                sound = bool(logits_SV[start + len(tokens) - 1].amax().isfinite())
                sampled.errors[column] = ALL_FORBIDDEN if sound else NOT_FINITE
                sampled.token_ids[column] = []

    def _report(self, rows: SampleRows, logits_SV: Tensor, sampled: SampledStep) -> None:
        """Fill in the log-probabilities of requests that asked."""
        asking = np.flatnonzero(self._num_logprobs[rows.slots_R] != NOT_ASKED)
        index: list[int] = []
        tokens: list[int] = []
        num_top: list[int] = []
        for r in asking.tolist():
            new = sampled.token_ids[rows.columns[r]]
            start = int(rows.starts_R[r])
            index += range(start, start + len(new))
            tokens += new
            num_top += [int(self._num_logprobs[rows.slots_R[r]])] * len(new)
        if not index:
            return
        place = torch.tensor(index).to(self._device)
        scores = token_logprobs(logits_SV[place], torch.tensor(tokens).to(self._device), num_top)
        for r in asking.tolist():
            count = len(sampled.token_ids[rows.columns[r]])
            sampled.logprobs[rows.columns[r]] = scores[:count]
            del scores[:count]
