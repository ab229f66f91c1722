"""ModelRunner: runs one step plan on the device.

Per step: apply diffs to the slot tables, gather the step's tensors, run the compiled step, sample or verify, append.
No Python loop over requests touches the device, and nothing waits for the device but reading the sampled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dovetail.messages import StepPlan, StepResult, TokenLogprobs
from dovetail.runner.forward import ForwardPass
from dovetail.runner.proposer import Proposer
from dovetail.runner.sampler import Sampler
from dovetail.runner.slots import StepRows

PROMPT_LOGPROBS_CHUNK = 256
"""Rows of logits that are in memory at a time for prompt log-probabilities."""


class ModelRunner:
    """Runs plans for one model on one platform."""

    def __init__(self, forward: ForwardPass, sampler: Sampler, proposer: Proposer | None) -> None:
        self._forward = forward
        self._tables = forward.tables
        self._sampler = sampler
        self._proposer = proposer
        self._prompt_logprobs: dict[int, int] = {}

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Run one step; see :class:`dovetail.messages.StepResult`."""
        self._apply(plan)
        rows, hidden_TD, logits_SV = self._forward.run(plan)
        prompt_logprobs = self._score_prompts(plan, rows, hidden_TD)
        draft_probs = None if self._proposer is None else self._proposer.draft_probs
        sampled = self._sampler.step(plan, logits_SV, draft_probs)
        self._append(plan, sampled.token_ids)
        return StepResult(
            step=plan.step,
            token_ids=sampled.token_ids,
            drafts=self._propose(plan, sampled.token_ids),
            logprobs=sampled.logprobs,
            prompt_logprobs=prompt_logprobs,
            errors=sampled.errors,
        )

    def _apply(self, plan: StepPlan) -> None:
        for slot in plan.freed_slots:
            self._prompt_logprobs.pop(slot, None)
        if self._proposer is not None:
            self._proposer.apply(plan)
        self._tables.apply(plan)
        for row in plan.new_rows:
            self._sampler.enter(row)
            if row.params.prompt_logprobs is not None:
                self._prompt_logprobs[row.slot] = row.prompt_len

    def _propose(self, plan: StepPlan, token_ids: Sequence[list[int]]) -> list[list[int]]:
        if self._proposer is None:
            return [[] for _ in plan.slots]
        return self._proposer.propose(plan, token_ids)

    def _append(self, plan: StepPlan, token_ids: Sequence[list[int]]) -> None:
        slots = [slot for slot, ids in zip(plan.slots, token_ids, strict=True) if ids]
        if slots:
            self._tables.append(slots, [ids for ids in token_ids if ids])

    def _score_prompts(self, plan: StepPlan, rows: StepRows, hidden_TD: Tensor) -> list[list[TokenLogprobs] | None]:
        """Log-probabilities of the prompt tokens that this chunk predicts."""
        scores: list[list[TokenLogprobs] | None] = [None] * len(plan.slots)
        if not self._prompt_logprobs:
            return scores
        for i, slot in enumerate(plan.slots):
            prompt_len = self._prompt_logprobs.get(slot, 0)
            first = plan.num_computed[i]
            count = min(plan.num_scheduled[i], prompt_len - 1 - first)
            if count > 0:
                start = int(rows.query_start_R1[i])
                scores[i] = self._score_rows(slot, hidden_TD[start : start + count], first + 1)
        return scores

    def _score_rows(self, slot: int, hidden_TD: Tensor, first: int) -> list[TokenLogprobs]:
        scores: list[TokenLogprobs] = []
        for chunk in torch.split(hidden_TD, PROMPT_LOGPROBS_CHUNK):
            start = first + len(scores)
            targets = self._tables.tokens_SL[slot, start : start + len(chunk)]
            scores += self._sampler.prompt_logprobs(slot, self._forward.model.logits(chunk), targets)
        return scores
