"""WholeSampler: sampling for platforms that compile it together with the model.

As :mod:`.sampler`, but every row goes through everything, so that no shape depends on what requests ask for; what is
not asked for is not read. Drafts are verified by coupling alone, whether they come with probabilities or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import Bucket, Platform
from dovetail.messages import NewRow, StepPlan, TokenLogprobs
from dovetail.runner.dense_rules import DenseRules
from dovetail.runner.logprobs import NOT_ASKED, Asked, Scores, score, told
from dovetail.runner.sample_inputs import SampleInputs, SampleOutputs
from dovetail.runner.sample_rows import SampleRows
from dovetail.runner.sampler import SampledStep, Sampling, draw
from dovetail.runner.sampling_table import SamplingTable
from dovetail.runner.stepped import PROMPT_LOGPROBS_CHUNK, PromptChunk, PromptScores
from dovetail.runner.verify import DraftRows, verify
from dovetail.sampling_params import MAX_LOGPROBS
from dovetail.tensors import leaves, replaced


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a step samples: for the program, and for whoever reads its outcome."""

    plan: StepPlan
    rows: SampleRows
    inputs: SampleInputs


class WholeSampler:
    """Samples for every request in a slot, in three parts: :meth:`prepare`, on the host; :meth:`choose`, which is
    compiled; :meth:`read`, on the host.
    """

    def __init__(
        self, max_num_seqs: int, vocab_size: int, most_drafts: int, platform: Platform, ops: OpTable, smallest: Bucket
    ) -> None:
        """Allocate tables.

        Args:
            most_drafts: of a request.
            smallest: bucket of the ladder.
        """
        self._nobody = max_num_seqs
        self._most_drafts = most_drafts
        self._platform = platform
        self._ops = ops
        self._table = SamplingTable(max_num_seqs + 1, vocab_size, platform)
        self._rules = DenseRules(max_num_seqs, vocab_size, most_drafts, platform, ops, smallest)
        self._asked = Asked(max_num_seqs + 1)

    def enter(self, rows: Sequence[NewRow]) -> None:
        """Requests replace those before them in their slots. Their parameters name tokens of the vocabulary only."""
        self._table.enter(rows)
        for row in rows:
            self._rules.enter(row)
            self._asked.enter(row.slot, row.params)

    def warm_up(self) -> None:
        """Compile what is no part of a step."""
        self._rules.warm_up()

    def prepare(self, plan: StepPlan, num_rows: int, num_requests: int, *, ruled: bool = False) -> Prepared:
        """What a step reads, padded.

        Args:
            plan: the step.
            num_rows: of logits.
            num_requests: with one row at least.
            ruled: with rules, even if nobody has one.
        """
        rows = SampleRows.of(plan).padded(num_rows, num_requests, self._nobody)
        asked = bool((self._asked.generated_S[rows.slots_R] != NOT_ASKED).any())
        return Prepared(plan, rows, self._inputs(rows, ruled or asked or self._rules.any_for(rows)))

    def padding(self, num_rows: int, num_requests: int, *, ruled: bool) -> SampleInputs:
        """What a step of padding alone reads."""
        nothing = np.zeros(0, dtype=np.int64)
        rows = SampleRows.build([], [], nothing, []).padded(num_rows, num_requests, self._nobody)
        return self._inputs(rows, ruled)

    def choose(self, logits_SV: Tensor, inputs: SampleInputs) -> SampleOutputs:
        """Sample, or verify drafts. In compiled steps only: no operation waits, or has a shape that depends on values.

        Args:
            logits_SV: raw logits.
            inputs: of as many rows.
        """
        if inputs.rules is None:
            tokens_S, tokens_RK = self._draw(logits_SV, inputs)
            return SampleOutputs(tokens_S=tokens_S, tokens_RK=tokens_RK)
        tokens_S, tokens_RK = self._draw(self._rules.apply(logits_SV, inputs.rules), inputs)
        self._rules.observe(inputs.rules, tokens_RK)
        return SampleOutputs(
            tokens_S=tokens_S,
            tokens_RK=tokens_RK,
            finite_S=logits_SV.amax(-1).isfinite(),
            scores=score(self._ops, logits_SV, tokens_S, MAX_LOGPROBS),  # a draft that stays is what its row draws
        )

    def score_prompts(self, logits: Iterable[Tensor], targets_T: Tensor) -> Scores:
        """Score the token after each. In compiled steps only.

        Args:
            logits: ``[PROMPT_LOGPROBS_CHUNK, V]`` each, the last perhaps less; made one by one.
        """
        targets = torch.split(targets_T, PROMPT_LOGPROBS_CHUNK)
        parts = [score(self._ops, *pair, MAX_LOGPROBS) for pair in zip(logits, targets, strict=True)]
        return Scores(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def read(
        self, prepared: Prepared, outputs: SampleOutputs, chunks: Sequence[PromptChunk]
    ) -> tuple[Sampling, PromptScores]:
        """What was chosen, and how likely what is scored was; copied to the host at once."""
        fetched = self._platform.download([leaf for leaf in leaves(outputs) if isinstance(leaf, Tensor)])
        host: list[SampleOutputs] = []

        def on_host() -> SampleOutputs:
            if not host:
                tensors = iter(fetched())
                host.append(replaced(outputs, lambda _: next(tensors)))
            return host[0]

        sampling = Sampling(outputs.tokens_S[: len(prepared.rows.columns)], lambda: self._sampled(prepared, on_host()))
        return sampling, lambda: self._prompt_scores(chunks, on_host())

    def _inputs(self, rows: SampleRows, ruled: bool) -> SampleInputs:
        drafts = DraftRows.of(rows, self._most_drafts, self._platform.device) if self._most_drafts else None
        return SampleInputs(
            params=replace(self._table.gather(rows), all_greedy=False, any_filter=True),
            drafts=drafts,
            rules=self._rules.prepare(rows) if ruled else None,
        )

    def _draw(self, ruled_SV: Tensor, inputs: SampleInputs) -> tuple[Tensor, Tensor]:
        tokens_S, marked_S = draw(self._ops, ruled_SV, inputs.params)
        return tokens_S, marked_S.unsqueeze(1) if inputs.drafts is None else verify(marked_S, inputs.drafts)

    def _sampled(self, prepared: Prepared, host: SampleOutputs) -> SampledStep:
        plan, rows = prepared.plan, prepared.rows
        sampled = SampledStep.of(plan, rows, host.tokens_RK, host.finite_S)
        for r, column in enumerate(rows.columns):
            num_top = int(self._asked.generated_S[rows.slots_R[r]])
            if num_top != NOT_ASKED and host.scores is not None:
                first, count = int(rows.starts_R[r]), len(sampled.token_ids[column])
                sampled.logprobs[column] = told(host.scores.part(first, count), [num_top] * count)
        return sampled

    def _prompt_scores(self, chunks: Sequence[PromptChunk], host: SampleOutputs) -> Mapping[int, list[TokenLogprobs]]:
        reports: dict[int, list[TokenLogprobs]] = {}
        for column, slot, row, length, _ in chunks:
            assert host.prompt_scores is not None
            num_top = [int(self._asked.prompt_S[slot])] * length
            reports[column] = told(host.prompt_scores.part(row, length), num_top)
        return reports
