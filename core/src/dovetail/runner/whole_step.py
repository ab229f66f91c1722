"""WholeStep: the model and sampling as one program, so that a step needs the device once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dovetail.contracts.attention import Metadata, StepTensors
from dovetail.contracts.platform import Bucket, Platform
from dovetail.messages import NewRow, StepPlan
from dovetail.runner.forward import ForwardPass
from dovetail.runner.sample_inputs import SampleInputs, SampleOutputs
from dovetail.runner.stepped import PROMPT_LOGPROBS_CHUNK, PromptChunk, Stepped, Stepper
from dovetail.runner.verify import DraftProbs
from dovetail.runner.whole_sampler import WholeSampler

Program = Callable[..., Any]
"""See :meth:`dovetail.contracts.platform.Platform.compile`: with what is sampled, which gives ``SampleOutputs``."""


class WholeStep(Stepper):
    """Implements :class:`.stepped.Stepper` by three kinds of program per bucket: most steps; those in which a request
    has a rule, or wants log-probabilities; and those in which a prompt is scored, compiled when the first one is met.
    """

    def __init__(self, platform: Platform, forward: ForwardPass, sampler: WholeSampler) -> None:
        self.forward = forward
        self._platform = platform
        self._sampler = sampler
        self._programs: dict[tuple[Program, Bucket], Program] = {}

    def enter(self, rows: Sequence[NewRow]) -> None:
        """See :meth:`.stepped.Stepper.enter`."""
        self._sampler.enter(rows)

    def run(
        self, plan: StepPlan, chunks: Sequence[PromptChunk] = (), draft_probs: DraftProbs | None = None
    ) -> Stepped:
        """See :meth:`.stepped.Stepper.run`. Nothing reads ``draft_probs``: drafts are coupled."""
        rows, bucket, step = self.forward.gather(plan)
        prepared = self._sampler.prepare(plan, *_sizes(step), ruled=bool(chunks))
        inputs, kind = prepared.inputs, self._plain if prepared.inputs.rules is None else self._ruled
        if chunks:
            inputs, kind = replace(inputs, targets_T=self.forward.tables.targets(rows, bucket)), self._scored
        outputs = self._program(kind, bucket)(step, self.forward.metadata(step), inputs)
        return Stepped(rows, *self._sampler.read(prepared, outputs, chunks))

    @torch.inference_mode()
    def warm_up(self, bucket: Bucket) -> Tensor | None:
        """See :meth:`.stepped.Stepper.warm_up`."""
        self._sampler.warm_up()
        for kind, ruled in ((self._plain, False), (self._ruled, True)):
            step = self.forward.padding(bucket)
            inputs = self._sampler.padding(*_sizes(step), ruled=ruled)
            self._program(kind, bucket)(step, self.forward.metadata(step), inputs)
        return None

    def close(self) -> None:
        """Forget the programs."""
        self._programs.clear()
        super().close()

    def _program(self, kind: Program, bucket: Bucket) -> Program:
        program = self._programs.get((kind, bucket))
        if program is None:
            program = self._programs[kind, bucket] = self._platform.compile(kind, bucket)
        return program

    # Platforms tell steps apart by the function that they compile, and each of those has one set of shapes per bucket.
    # So these two are not one, which would have inputs with rules now, and without them then.

    def _plain(self, step: StepTensors, metadata: Sequence[Metadata], inputs: SampleInputs) -> SampleOutputs:
        """Without rules in ``inputs``: nobody has one, so steps do not read tables as wide as the vocabulary."""
        _, logits_SV = self.forward.some(step, metadata)
        return self._sampler.choose(logits_SV, inputs)

    def _ruled(self, step: StepTensors, metadata: Sequence[Metadata], inputs: SampleInputs) -> SampleOutputs:
        """With them, and log-probabilities: the sampler does more for the same call."""
        return self._plain(step, metadata, inputs)

    def _scored(self, step: StepTensors, metadata: Sequence[Metadata], inputs: SampleInputs) -> SampleOutputs:
        hidden_TD, logits_SV = self.forward.every(step, metadata)
        assert inputs.targets_T is not None
        parts = (self.forward.model.logits(part_TD) for part_TD in torch.split(hidden_TD, PROMPT_LOGPROBS_CHUNK))
        scores = self._sampler.score_prompts(parts, inputs.targets_T)
        return replace(self._sampler.choose(logits_SV, inputs), prompt_scores=scores)


def _sizes(step: StepTensors) -> tuple[int, int]:
    """Rows of logits, and requests that may have one."""
    num_rows = len(step.logits_rows_S)
    return num_rows, min(num_rows, len(step.seq_lens_R))
