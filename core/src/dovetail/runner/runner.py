"""ModelRunner: runs one step plan on the device.

Per step: apply diffs to the slot tables, gather the step's tensors, run the compiled step, sample or verify, append.
No Python loop over requests touches the device. Sampled tokens go from the sampler into the slot tables without passing
the host, which reads them when it needs to know: by then the next step may be under way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dovetail.messages import StepPlan, StepResult, TokenLogprobs
from dovetail.runner.forward import ForwardPass
from dovetail.runner.proposer import Proposer
from dovetail.runner.sampler import SampledStep, Sampler
from dovetail.runner.slots import StepRows

PROMPT_LOGPROBS_CHUNK = 256
"""Rows of logits that are in memory at a time for prompt log-probabilities."""

_PromptScores = dict[int, list[Callable[[], list[TokenLogprobs]]]]
"""Column of a plan -> what reads its log-probabilities, in chunks."""


class ModelRunner:
    """Runs plans for one model on one platform."""

    def __init__(self, forward: ForwardPass, sampler: Sampler, proposer: Proposer | None) -> None:
        self._forward = forward
        self._tables = forward.tables
        self._sampler = sampler
        self._proposer = proposer
        self._prompt_logprobs: dict[int, int] = {}

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Queue one step; the call that is returned waits for its result.

        A speculator must know what was sampled before it proposes, so with one the step is complete on return.
        """
        self._apply(plan)
        whole = self._scores_prompt(plan)
        rows, hidden_TD, logits_SV = self._forward.run(plan, whole=whole)
        scores = self._score_prompts(plan, rows, hidden_TD) if whole else {}
        draft_probs = None if self._proposer is None else self._proposer.draft_probs
        sampling = self._sampler.step(plan, logits_SV, draft_probs)
        if self._proposer is not None:
            result = self._speculate(plan, sampling.read(), scores, self._proposer)
            return lambda: result
        if len(rows.sampling):
            self._tables.append_sampled(rows, sampling.next_R)
        return lambda: _result(plan, sampling.read(), scores)

    def _speculate(
        self, plan: StepPlan, sampled: SampledStep, scores: _PromptScores, proposer: Proposer
    ) -> StepResult:
        self._append(plan, sampled.token_ids)
        return _result(plan, sampled, scores, proposer.propose(plan, sampled.token_ids))

    def _apply(self, plan: StepPlan) -> None:
        for slot in plan.freed_slots:
            self._prompt_logprobs.pop(slot, None)
        if self._proposer is not None:
            self._proposer.apply(plan)
        self._tables.apply(plan)
        if plan.new_rows:
            self._sampler.enter(plan.new_rows)
        for row in plan.new_rows:
            if row.params.prompt_logprobs is not None:
                self._prompt_logprobs[row.slot] = row.prompt_len

    def _append(self, plan: StepPlan, token_ids: Sequence[list[int]]) -> None:
        slots = [slot for slot, ids in zip(plan.slots, token_ids, strict=True) if ids]
        if slots:
            self._tables.append(slots, [ids for ids in token_ids if ids])

    def _scores_prompt(self, plan: StepPlan) -> bool:
        """Whether the step computes a prompt whose log-probabilities are wanted."""
        if not self._prompt_logprobs:
            return False
        places = zip(plan.slots, plan.num_computed, strict=True)
        return any(computed < self._prompt_logprobs.get(slot, 0) - 1 for slot, computed in places)

    def _score_prompts(self, plan: StepPlan, rows: StepRows, hidden_TD: Tensor) -> _PromptScores:
        """Log-probabilities of the prompt tokens that this chunk predicts, by column."""
        scores: _PromptScores = {}
        for i, slot in enumerate(plan.slots):
            prompt_len = self._prompt_logprobs.get(slot, 0)
            first = plan.num_computed[i]
            count = min(plan.num_scheduled[i], prompt_len - 1 - first)
            if count > 0:
                start = int(rows.query_start_R1[i])
                scores[i] = self._score_rows(slot, hidden_TD[start : start + count], first + 1)
        return scores

    def _score_rows(self, slot: int, hidden_TD: Tensor, first: int) -> list[Callable[[], list[TokenLogprobs]]]:
        scores = []
        for chunk in torch.split(hidden_TD, PROMPT_LOGPROBS_CHUNK):
            targets = self._tables.tokens_SL[slot, first : first + len(chunk)]
            scores.append(self._sampler.prompt_logprobs(slot, self._forward.model.logits(chunk), targets))
            first += len(chunk)
        return scores


def _result(
    plan: StepPlan, sampled: SampledStep, scores: _PromptScores, drafts: list[list[int]] | None = None
) -> StepResult:
    prompt_logprobs: list[list[TokenLogprobs] | None] = [None] * len(plan.slots)
    for column, chunks in scores.items():
        prompt_logprobs[column] = [score for read in chunks for score in read()]
    return StepResult(
        step=plan.step,
        token_ids=sampled.token_ids,
        drafts=[[] for _ in plan.slots] if drafts is None else drafts,
        logprobs=sampled.logprobs,
        prompt_logprobs=prompt_logprobs,
        errors=sampled.errors,
    )
