"""Proposer: asks the speculative decoder for drafts after each step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dovetail.contracts.specdec import SpecDecoder, SpecState
from dovetail.messages import NewRow, StepPlan
from dovetail.ops.random import signed64
from dovetail.runner.draft_model import DraftRunner
from dovetail.runner.sampling_table import effective_temperature
from dovetail.runner.slots import SlotTables
from dovetail.runner.verify import DraftProbs


class Proposer:
    """One decoder, the draft model that the core runs for it, and what both need to know of each slot.

    Attributes:
        draft_probs: what the drafts of the latest step were drawn from; None if they are deterministic.
    """

    def __init__(
        self,
        decoder: SpecDecoder,
        draft: DraftRunner | None,
        tables: SlotTables,
        num_speculative_tokens: int,
    ) -> None:
        self.draft_probs: DraftProbs | None = None
        self._decoder = decoder
        self._draft = draft
        self._tables = tables
        self._num_speculative_tokens = num_speculative_tokens
        self._temperature_S = torch.zeros(tables.max_num_seqs)
        self._seeds_S = torch.zeros(tables.max_num_seqs, dtype=torch.int64)
        self._limit_S = np.zeros(tables.max_num_seqs, dtype=np.int64)

    def apply(self, plan: StepPlan) -> None:
        """Forget the requests that left, and note those that enter."""
        if plan.freed_slots:
            self._decoder.release(plan.freed_slots)
            if self._draft is not None:
                self._draft.release(plan.freed_slots)
        for row in plan.new_rows:
            self._enter(row)

    def propose(self, plan: StepPlan, token_ids: Sequence[list[int]]) -> list[list[int]]:
        """Drafts for the requests that got tokens in this step; columns match ``StepPlan.slots``."""
        drafts: list[list[int]] = [[] for _ in plan.slots]
        rows = [i for i, ids in enumerate(token_ids) if ids]
        if not rows:
            return drafts
        slots = [plan.slots[i] for i in rows]
        if self._draft is not None:
            self._draft.accept(slots, [len(token_ids[i]) - 1 for i in rows])
        proposal = self._decoder.propose(self._state(slots))
        self.draft_probs = DraftProbs.of(slots, proposal)
        for i, ids in zip(rows, proposal.token_ids, strict=True):
            drafts[i] = ids
        return drafts

    def _enter(self, row: NewRow) -> None:
        longest = self._tables.max_model_len
        self._temperature_S[row.slot] = effective_temperature(row.params)
        self._seeds_S[row.slot] = signed64(row.seed)
        self._limit_S[row.slot] = min(row.prompt_len + (row.params.max_tokens or longest), longest)

    def _state(self, slots: Sequence[int]) -> SpecState:
        num_tokens_S = self._tables.num_tokens_S
        room = np.minimum(self._limit_S[slots] - num_tokens_S[slots] - 1, self._num_speculative_tokens)
        return SpecState(
            slots=slots,
            tokens_SL=self._tables.tokens_SL,
            num_tokens_S=torch.from_numpy(num_tokens_S),
            temperature_S=self._temperature_S,
            seeds_S=self._seeds_S,
            limit=np.maximum(room, 0).tolist(),
        )
