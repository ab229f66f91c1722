"""Sampler: turns a step's logits into tokens and log-probabilities.

Order: bias, allowed tokens, min_tokens, penalties, temperature, min-p, top-k, top-p, then a draw with noise
that depends on (request seed, position) alone. Work that no request of a step needs is left out, decided by
flags on the host; a request's tokens never depend on its neighbours. Nothing here waits for the device but reading
the outcome.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import Platform
from dovetail.messages import NewRow, StepPlan, TokenLogprobs
from dovetail.ops.sampling import ALL_GREEDY, SamplingTensors
from dovetail.runner.logit_rules import LogitRules
from dovetail.runner.logprobs import NOT_ASKED, Asked, reports, score
from dovetail.runner.sample_rows import NO_TOKEN, SampleRows
from dovetail.runner.sampling_table import SamplingTable
from dovetail.runner.verify import POISONED, DraftProbs, DraftRows, verify, verify_drawn

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

    @classmethod
    def empty(cls, plan: StepPlan) -> SampledStep:
        """Of a step in which nobody samples."""
        return cls([[] for _ in plan.slots], [None] * len(plan.slots))

    @classmethod
    def of(cls, plan: StepPlan, rows: SampleRows, tokens_RK: Tensor, finite_S: Tensor | None = None) -> SampledStep:
        """What was chosen, on the host, without log-probabilities.

        Args:
            tokens_RK: accepted drafts, one more token or ``POISONED``, then ``NO_TOKEN``; perhaps with padding rows.
            finite_S: which rows had a choice before the rules, if there are any.
        """
        sampled = cls.empty(plan)
        for r, (column, chosen) in enumerate(zip(rows.columns, tokens_RK.tolist(), strict=False)):
            tokens = [token for token in chosen if token != NO_TOKEN]
            if tokens[-1] == POISONED:
                row = int(rows.starts_R[r]) + len(tokens) - 1
                sampled.errors[column] = NOT_FINITE if finite_S is None or not finite_S[row] else ALL_FORBIDDEN
            else:
                sampled.token_ids[column] = tokens
        return sampled


@dataclass(frozen=True, slots=True)
class Sampling:
    """A step's tokens on the device.

    Attributes:
        next_R: int64: a token of the vocabulary for each request that samples, in the plan's order. Where the request
            cannot go on it is an arbitrary one; with drafts, it is the one drawn first.
        read: waits for the tokens.
    """

    next_R: Tensor
    read: Callable[[], SampledStep]


class Sampler:
    """Samples for every request in a slot."""

    def __init__(self, max_num_seqs: int, vocab_size: int, platform: Platform, ops: OpTable) -> None:
        self._platform = platform
        self._ops = ops
        self._table = SamplingTable(max_num_seqs, vocab_size, platform)
        self._rules = LogitRules(max_num_seqs, vocab_size, platform, ops)
        self._plain = np.zeros(max_num_seqs, dtype=bool)
        self._asked = Asked(max_num_seqs)

    def enter(self, rows: Sequence[NewRow]) -> None:
        """Requests replace those before them in their slots. Their parameters name tokens of the vocabulary only."""
        self._table.enter(rows)
        for row in rows:
            self._rules.enter(row)
            self._asked.enter(row.slot, row.params)
            greedy, ruled = self._table.is_greedy(row.slot), self._rules.any_for(row.slot)
            self._plain[row.slot] = greedy and not ruled and row.params.logprobs is None

    def step(self, plan: StepPlan, logits_SV: Tensor, draft_probs: DraftProbs | None = None) -> Sampling:
        """Sample, or verify drafts, for every request of the plan that samples.

        Args:
            plan: the step.
            logits_SV: raw logits, rows in the plan's order: one per draft and one more for each request that
                samples. They may be overwritten once later work is queued.
            draft_probs: what the plan's drafts were drawn from; None if they are deterministic.
        """
        if not len(logits_SV):
            return Sampling(logits_SV.new_empty(0, dtype=torch.int64), lambda: SampledStep.empty(plan))
        if self._plain[plan.slots].all() and not any(plan.drafts):
            return self._largest(plan, logits_SV)
        rows = SampleRows.of(plan)
        ruled_SV = self._rules.apply(logits_SV, rows)
        tokens_S, tokens_RK = self._choose(rows, ruled_SV, draft_probs)
        self._rules.observe(rows.slots_R, tokens_RK)
        fetched = self._platform.download([tokens_RK, *self._finite(logits_SV, ruled_SV)])
        report = self._report(rows, logits_SV, tokens_RK)

        def read() -> SampledStep:
            tokens_RK, *finite_S = fetched()
            sampled = SampledStep.of(plan, rows, tokens_RK, *finite_S)
            report(sampled)
            return sampled

        return Sampling(tokens_S, read)

    def _largest(self, plan: StepPlan, logits_SV: Tensor) -> Sampling:
        """The short way for requests that just take the largest logit.

        Right after a step the caches hold weights, not this code: every operation left out here counts.
        """
        tokens_S = self._ops.sample(logits_SV, ALL_GREEDY)
        fetched = self._platform.download([tokens_S, logits_SV.gather(1, tokens_S.unsqueeze(1))])

        def read() -> SampledStep:
            tokens, logits = fetched()
            sampled = SampledStep.empty(plan)
            chosen = zip(_sampling(plan), tokens.tolist(), logits.flatten().tolist(), strict=True)
            for column, token, logit in chosen:
                if math.isfinite(logit):
                    sampled.token_ids[column] = [token]
                else:
                    sampled.errors[column] = NOT_FINITE
            return sampled

        return Sampling(tokens_S, read)

    def prompt_logprobs(
        self, slot: int, logits_SV: Tensor, targets_S: Tensor
    ) -> Callable[[], list[TokenLogprobs]]:
        """Log-probabilities of prompt tokens, given the logits that predict them; the call waits for them."""
        num_top = int(self._asked.prompt_S[slot])
        return reports(self._platform, score(self._ops, logits_SV, targets_S, num_top), [num_top] * len(targets_S))

    def _choose(
        self, rows: SampleRows, ruled_SV: Tensor, draft_probs: DraftProbs | None
    ) -> tuple[Tensor, Tensor]:
        """The token of each row; and of each request accepted drafts, one more or ``POISONED``, then ``NO_TOKEN``."""
        params = self._table.gather(rows)
        tokens_S, marked_S = draw(self._ops, ruled_SV, params)
        if not rows.has_drafts:
            return tokens_S, marked_S.unsqueeze(1)
        drafts = DraftRows.of(rows, rows.max_drafts, ruled_SV.device)
        if draft_probs is None or params.all_greedy:
            return tokens_S, verify(marked_S, drafts)
        return tokens_S, verify_drawn(marked_S, drafts, ruled_SV, params, draft_probs.gather(rows), self._ops)

    @staticmethod
    def _finite(logits_SV: Tensor, ruled_SV: Tensor) -> list[Tensor]:
        """Which rows had a choice before the rules, if there are any: who took it away is told to the user."""
        return [] if ruled_SV is logits_SV else [logits_SV.amax(-1).isfinite()]

    def _report(self, rows: SampleRows, logits_SV: Tensor, tokens_RK: Tensor) -> Callable[[SampledStep], None]:
        """Score what was chosen for requests that asked; the call fills in their log-probabilities."""
        asking = np.flatnonzero(self._asked.generated_S[rows.slots_R] != NOT_ASKED).tolist()
        if not asking:
            return _nothing
        counts = [len(rows.drafts[r]) + 1 for r in asking]
        offsets = [offset for count in counts for offset in range(count)]
        request = np.repeat(asking, counts)
        num_top = [int(number) for number in self._asked.generated_S[rows.slots_R[request]]]
        place = self._platform.upload(torch.from_numpy(np.stack([request, offsets, rows.starts_R[request] + offsets])))
        tokens_S = tokens_RK[place[0], place[1]].clamp(min=0)  # beyond a request's last token nothing is read
        make = reports(self._platform, score(self._ops, logits_SV[place[2]], tokens_S, max(num_top)), num_top)

        def fill(sampled: SampledStep) -> None:
            scores = iter(make())
            for r, count in zip(asking, counts, strict=True):
                mine = [next(scores) for _ in range(count)]
                column = rows.columns[r]
                sampled.logprobs[column] = mine[: len(sampled.token_ids[column])]

        return fill


def draw(ops: OpTable, ruled_SV: Tensor, params: SamplingTensors) -> tuple[Tensor, Tensor]:
    """The token of each row; and the same with ``POISONED`` where none could be chosen."""
    tokens_S = ops.sample(ruled_SV, params)
    finite_S = ruled_SV.gather(1, tokens_S.unsqueeze(1)).squeeze(1).isfinite()
    return tokens_S, torch.where(finite_S, tokens_S, POISONED)


def _sampling(plan: StepPlan) -> Sequence[int]:
    """The plan's columns that sample."""
    return [column for column, samples in enumerate(plan.samples) if samples]


def _nothing(sampled: SampledStep) -> None:
    """Nobody asked."""
