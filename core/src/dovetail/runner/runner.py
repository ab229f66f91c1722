"""ModelRunner: runs one step plan on the device.

Per step: apply diffs to the slot tables, gather the step's tensors, run the compiled step, sample or verify, append.
No Python loop over requests touches the device. Sampled tokens go from the sampler into the slot tables without passing
the host, which reads them when it needs to know: by then the next step may be under way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dovetail.messages import StepPlan, StepResult, TokenLogprobs
from dovetail.runner.proposer import Proposer
from dovetail.runner.sampler import SampledStep
from dovetail.runner.stepped import PromptChunk, PromptScores, Stepper


class ModelRunner:
    """Runs plans for one model on one platform."""

    def __init__(self, stepper: Stepper, proposer: Proposer | None) -> None:
        self._stepper = stepper
        self._tables = stepper.forward.tables
        self._proposer = proposer
        self._prompt_logprobs: dict[int, int] = {}

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Queue one step; the call that is returned waits for its result.

        A speculator must know what was sampled before it proposes, so with one the step is complete on return.
        """
        self._apply(plan)
        draft_probs = None if self._proposer is None else self._proposer.draft_probs
        stepped = self._stepper.run(plan, self._prompt_chunks(plan), draft_probs)
        sampling, scores = stepped.sampling, stepped.prompt_scores
        if self._proposer is not None:
            result = self._speculate(plan, sampling.read(), scores, self._proposer)
            return lambda: result
        if len(stepped.rows.sampling):
            self._tables.append_sampled(stepped.rows, sampling.next_R)
        return lambda: _result(plan, sampling.read(), scores)

    def _speculate(
        self, plan: StepPlan, sampled: SampledStep, scores: PromptScores, proposer: Proposer
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
            self._stepper.enter(plan.new_rows)
        for row in plan.new_rows:
            if row.params.prompt_logprobs is not None:
                self._prompt_logprobs[row.slot] = row.prompt_len

    def _append(self, plan: StepPlan, token_ids: Sequence[list[int]]) -> None:
        slots = [slot for slot, ids in zip(plan.slots, token_ids, strict=True) if ids]
        if slots:
            self._tables.append(slots, [ids for ids in token_ids if ids])

    def _prompt_chunks(self, plan: StepPlan) -> list[PromptChunk]:
        """What the step computes of prompts whose log-probabilities are wanted."""
        if not self._prompt_logprobs:
            return []
        chunks, row = [], 0
        for column, slot in enumerate(plan.slots):
            first, scheduled = plan.num_computed[column], plan.num_scheduled[column]
            count = min(scheduled, self._prompt_logprobs.get(slot, 0) - 1 - first)
            if count > 0:
                chunks.append(PromptChunk(column, slot, row, count, first + 1))
            row += scheduled
        return chunks


def _result(
    plan: StepPlan, sampled: SampledStep, scores: PromptScores, drafts: list[list[int]] | None = None
) -> StepResult:
    prompt_logprobs: list[list[TokenLogprobs] | None] = [None] * len(plan.slots)
    for column, of_prompt in scores().items():
        prompt_logprobs[column] = of_prompt
    return StepResult(
        step=plan.step,
        token_ids=sampled.token_ids,
        drafts=[[] for _ in plan.slots] if drafts is None else drafts,
        logprobs=sampled.logprobs,
        prompt_logprobs=prompt_logprobs,
        errors=sampled.errors,
    )
