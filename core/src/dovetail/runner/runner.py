"""ModelRunner: runs one step plan on the device.

Per step: apply diffs to the slot tables, gather the step's tensors, run the compiled step, sample or verify, append.
No Python loop over requests touches the device, and nothing waits for the device but reading the sampled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dovetail.contracts.attention import AttentionBackend, AttentionSpec, KVCache, Metadata, StepTensors
from dovetail.contracts.executor import KVGroup
from dovetail.contracts.model import Model
from dovetail.contracts.platform import Bucket, Platform, ShapePolicy, StepFunction
from dovetail.contracts.specdec import SpecDecoder, SpecState
from dovetail.errors import PluginError
from dovetail.messages import StepPlan, StepResult, TokenLogprobs
from dovetail.runner.sampler import Sampler
from dovetail.runner.slots import SlotTables, StepRows
from dovetail.runner.verify import DraftProbs

PROMPT_LOGPROBS_CHUNK = 256
"""Rows of logits that are in memory at a time for prompt log-probabilities."""


class ModelRunner:
    """Runs plans for one model on one platform."""

    def __init__(
        self,
        *,
        platform: Platform,
        model: Model,
        backend: AttentionBackend,
        specs: Sequence[AttentionSpec],
        groups: Sequence[KVGroup],
        caches: Sequence[KVCache],
        tables: SlotTables,
        sampler: Sampler,
        shapes: ShapePolicy,
        spec_decoder: SpecDecoder | None,
        num_speculative_tokens: int,
        vocab_size: int,
    ) -> None:
        self._platform = platform
        self._model = model
        self._backend = backend
        self._specs = specs
        self._caches = caches
        self._group_of = {layer: g for g, group in enumerate(groups) for layer in group.layers}
        self._num_groups = len(groups)
        self._tables = tables
        self._sampler = sampler
        self._shapes = shapes
        self._spec_decoder = spec_decoder
        self._num_speculative_tokens = num_speculative_tokens
        self._vocab_size = vocab_size
        self._steps: dict[Bucket, StepFunction] = {}
        self._prompt_logprobs: dict[int, int] = {}
        self._temperature_S = torch.zeros(tables.max_num_seqs)
        self._limit_S = np.zeros(tables.max_num_seqs, dtype=np.int64)
        self._draft_probs: DraftProbs | None = None

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Run one step; see :class:`dovetail.messages.StepResult`."""
        self._apply(plan)
        rows = StepRows.of(plan)
        bucket = self._shapes.fit(len(rows.positions_T), len(rows.slots_R))
        step = self._tables.step_tensors(rows, bucket, self._num_logits(bucket) if self._shapes.static else None)
        hidden_TD, logits_SV = self._compiled(bucket)(step, self._metadata(step))
        prompt_logprobs = self._score_prompts(plan, rows, hidden_TD)
        sampled = self._sampler.step(plan, logits_SV[: len(rows.logits_rows_S)], self._draft_probs)
        self._append(plan, sampled.token_ids)
        return StepResult(
            step=plan.step,
            token_ids=sampled.token_ids,
            drafts=self._propose(plan, sampled.token_ids),
            logprobs=sampled.logprobs,
            prompt_logprobs=prompt_logprobs,
            errors=sampled.errors,
        )

    @torch.inference_mode()
    def warm_up(self, bucket: Bucket) -> None:
        """Compile and run one bucket on padding alone."""
        step = self._tables.padding_step(bucket, self._num_logits(bucket))
        self._compiled(bucket)(step, self._metadata(step))

    def _apply(self, plan: StepPlan) -> None:
        for slot in plan.freed_slots:
            self._prompt_logprobs.pop(slot, None)
        if self._spec_decoder is not None and plan.freed_slots:
            self._spec_decoder.release(plan.freed_slots)
        self._tables.apply(plan)
        for row in plan.new_rows:
            self._sampler.enter(row)
            self._temperature_S[row.slot] = row.params.temperature
            limit = row.params.max_tokens or self._tables.max_model_len
            self._limit_S[row.slot] = min(row.prompt_len + limit, self._tables.max_model_len)
            if row.params.prompt_logprobs is not None:
                self._prompt_logprobs[row.slot] = row.prompt_len

    def _num_logits(self, bucket: Bucket) -> int:
        return bucket.num_requests * (1 + self._num_speculative_tokens)

    def _metadata(self, step: StepTensors) -> list[Metadata]:
        return [self._backend.build_metadata(step, group) for group in range(self._num_groups)]

    def _compiled(self, bucket: Bucket) -> StepFunction:
        step = self._steps.get(bucket)
        if step is None:
            step = self._steps[bucket] = self._platform.compile(self._forward, bucket)
        return step

    def _forward(self, step: StepTensors, metadata: Sequence[Metadata]) -> tuple[Tensor, Tensor]:
        forward, caches, specs, group_of = self._backend.forward, self._caches, self._specs, self._group_of

        def attend(layer: int, q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor) -> Tensor:
            return forward(q_THK, k_TNK, v_TNK, caches[layer], metadata[group_of[layer]], specs[layer])

        hidden_TD = self._model.forward(step.token_ids_T, step.positions_T, attend)
        return hidden_TD, self._model.logits(hidden_TD[step.logits_rows_S])

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
            scores += self._sampler.prompt_logprobs(slot, self._model.logits(chunk), targets)
        return scores

    def _propose(self, plan: StepPlan, token_ids: Sequence[list[int]]) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in plan.slots]
        if self._spec_decoder is None:
            return drafts
        rows = [i for i, ids in enumerate(token_ids) if ids]
        if not rows:
            return drafts
        slots = [plan.slots[i] for i in rows]
        state = self._spec_state(slots)
        proposal = self._spec_decoder.propose(state)
        self._draft_probs = DraftProbs.of(slots, proposal)
        for i, ids, limit in zip(rows, proposal.token_ids, state.limit, strict=True):
            self._check_drafts(ids, limit)
            drafts[i] = ids
        return drafts

    def _check_drafts(self, ids: Sequence[int], limit: int) -> None:
        decoder = type(self._spec_decoder).__qualname__
        if len(ids) > limit:
            raise PluginError(f"{decoder}.propose drafted {len(ids)} tokens where SpecState.limit was {limit}.")
        foreign = [token for token in ids if not 0 <= token < self._vocab_size]
        if foreign:
            raise PluginError(f"{decoder}.propose drafted {foreign}, outside the vocabulary of {self._vocab_size}.")

    def _spec_state(self, slots: Sequence[int]) -> SpecState:
        num_tokens_S = self._tables.num_tokens_S
        room = np.minimum(self._limit_S[slots] - num_tokens_S[slots] - 1, self._num_speculative_tokens)
        return SpecState(
            slots=slots,
            tokens_SL=self._tables.tokens_SL,
            num_tokens_S=torch.from_numpy(num_tokens_S),
            temperature_S=self._temperature_S,
            limit=np.maximum(room, 0).tolist(),
        )
