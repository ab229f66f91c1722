"""SplitStep: the model as one program, its logits sampled by operations that are launched one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dovetail.contracts.platform import Bucket
from dovetail.messages import NewRow, StepPlan, TokenLogprobs
from dovetail.runner.forward import ForwardPass
from dovetail.runner.sampler import Sampler
from dovetail.runner.stepped import PROMPT_LOGPROBS_CHUNK, PromptChunk, PromptScores, Stepped, Stepper
from dovetail.runner.verify import DraftProbs


class SplitStep(Stepper):
    """Implements :class:`.stepped.Stepper`: a step does no more work than its requests need.

    Attributes:
        sampler: to warm up.
    """

    def __init__(self, forward: ForwardPass, sampler: Sampler) -> None:
        self.forward = forward
        self.sampler = sampler

    def enter(self, rows: Sequence[NewRow]) -> None:
        """See :meth:`.stepped.Stepper.enter`."""
        self.sampler.enter(rows)

    def run(
        self, plan: StepPlan, chunks: Sequence[PromptChunk] = (), draft_probs: DraftProbs | None = None
    ) -> Stepped:
        """See :meth:`.stepped.Stepper.run`."""
        rows, hidden_TD, logits_SV = self.forward.run(plan, whole=bool(chunks))
        scores = self._score(chunks, hidden_TD)
        return Stepped(rows, self.sampler.step(plan, logits_SV, draft_probs), scores)

    def warm_up(self, bucket: Bucket) -> Tensor | None:
        """See :meth:`.stepped.Stepper.warm_up`."""
        return self.forward.warm_up(bucket)

    def _score(self, chunks: Sequence[PromptChunk], hidden_TD: Tensor) -> PromptScores:
        reads: dict[int, list[Callable[[], list[TokenLogprobs]]]] = {}
        for column, slot, row, length, first in chunks:
            targets = self.forward.tables.tokens_SL[slot, first : first + length]
            both = (hidden_TD[row : row + length], targets)
            parts = zip(*(torch.split(tensor, PROMPT_LOGPROBS_CHUNK) for tensor in both), strict=True)
            logits = ((self.forward.model.logits(part_TD), part_T) for part_TD, part_T in parts)
            reads[column] = [self.sampler.prompt_logprobs(slot, *pair) for pair in logits]

        def read() -> Mapping[int, list[TokenLogprobs]]:
            return {column: [score for part in parts for score in part()] for column, parts in reads.items()}

        return read
