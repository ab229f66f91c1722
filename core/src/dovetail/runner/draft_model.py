"""DraftRunner: a second, smaller model of the engine, run for speculative decoders that draft with one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dovetail.contracts.platform import ShapePolicy
from dovetail.contracts.specdec import SpecState
from dovetail.kv.pool import BlockPool
from dovetail.messages import NULL_BLOCK, StepPlan
from dovetail.runner.draft_memory import draft_groups
from dovetail.runner.loaded_model import LoadedModel
from dovetail.runner.slots import SlotTables

BlockUpdate = tuple[int, int, int, list[int]]
"""As in ``StepPlan.block_updates``."""


class DraftRunner:
    """Implements :class:`dovetail.contracts.specdec.DraftModel` over a forward pass of its own.

    It has slots and tokens in common with the engine's model, and its own KV cache: a slot takes blocks as its request
    grows. The cache is large enough for one request of any length; when it is full, requests without blocks are not
    drafted for until others leave.

    Attributes:
        forward: to warm up.
    """

    def __init__(self, loaded: LoadedModel, shapes: ShapePolicy, tables: SlotTables, num_blocks: int) -> None:
        """Allocate the cache.

        Args:
            loaded: the draft model.
            shapes: the engine's step sizes, which are the draft's as well.
            tables: of the engine's model, whose tokens it reads.
            num_blocks: of the cache, the null block included.
        """
        config = loaded.config
        self._tables = SlotTables(
            config.max_num_seqs, config.max_model_len, config.block_size, 1, loaded.platform, tables
        )
        groups = draft_groups(loaded.facts.attention)
        self.forward = loaded.forward_pass(groups, num_blocks, self._tables, shapes, logits_per_request=1)
        self._pool = BlockPool(num_blocks)
        self._block_size = config.block_size
        self._max_tokens = config.max_num_batched_tokens
        self._num_speculative_tokens = config.num_speculative_tokens
        self._blocks: list[list[int]] = [[] for _ in range(config.max_num_seqs)]
        # Per slot: tokens whose keys and values are stored, verified ones and then own drafts.
        self._stored_S = np.zeros(config.max_num_seqs, dtype=np.int64)
        self._drafted_S = np.zeros(config.max_num_seqs, dtype=np.int64)
        self._slots: list[int] = []

    def catch_up(self, state: SpecState) -> tuple[list[int], Tensor]:
        """See :meth:`dovetail.contracts.specdec.DraftModel.catch_up`."""
        known_S = state.num_tokens_S.numpy()
        missing = {i: int(known_S[s] - self._stored_S[s]) for i, s in enumerate(state.slots) if state.limit[i] > 0}
        budget = self._max_tokens
        entries: list[int] = []
        counts: list[int] = []
        updates: list[BlockUpdate] = []
        for i in sorted(missing, key=missing.__getitem__):  # whoever decodes is not held up by a long prompt
            slot, count = state.slots[i], min(missing[i], budget)
            longest = int(known_S[slot]) + self._num_speculative_tokens - 1
            if count == 0 or not self._grow(slot, min(longest, self._tables.max_model_len), updates):
                continue
            budget -= count
            entries.append(i)
            counts.append(count)
        if not entries:
            self._slots = []
            return [], torch.empty(0, 0, device=self._tables.tokens_SL.device)
        slots = [state.slots[i] for i in entries]
        complete = [missing[i] == count for i, count in zip(entries, counts, strict=True)]
        self._slots = [slot for slot, done in zip(slots, complete, strict=True) if done]
        logits_RV = self._run(slots, self._stored_S[slots].tolist(), counts, complete, updates)
        self._stored_S[slots] += counts
        return [i for i, done in zip(entries, complete, strict=True) if done], logits_RV

    def extend(self, token_ids_R: Tensor) -> Tensor:
        """See :meth:`dovetail.contracts.specdec.DraftModel.extend`."""
        slots = self._slots
        # Beyond the longest context nobody reads what is stored, nor drafts: the last position may be overwritten.
        last = self._tables.max_model_len - 1
        positions = np.minimum(self._stored_S[slots] + self._drafted_S[slots], last)
        self._tables.write(np.array(slots), positions, token_ids_R)
        self._drafted_S[slots] += 1
        return self._run(slots, positions.tolist(), [1] * len(slots), [True] * len(slots), [])

    def accept(self, slots: Sequence[int], accepted: Sequence[int]) -> None:
        """So many of each request's last drafts were verified; the others never were."""
        self._stored_S[slots] += np.minimum(accepted, self._drafted_S[slots])
        self._drafted_S[slots] = 0

    def release(self, slots: Sequence[int]) -> None:
        """The requests in these slots left."""
        for slot in slots:
            self._pool.free(reversed(self._blocks[slot]))
            self._blocks[slot] = []
            self._tables.block_tables[0][slot] = NULL_BLOCK
        self._stored_S[slots] = 0
        self._drafted_S[slots] = 0

    def _grow(self, slot: int, num_tokens: int, updates: list[BlockUpdate]) -> bool:
        """Give a slot blocks for so many tokens, and note it; False if there are too few."""
        blocks = self._blocks[slot]
        count = -(-num_tokens // self._block_size) - len(blocks)
        if count > self._pool.num_free:
            return False
        if count > 0:
            updates.append((slot, 0, len(blocks), self._pool.allocate(count)))
            blocks += updates[-1][3]
        return True

    def _run(
        self,
        slots: list[int],
        num_computed: list[int],
        num_scheduled: list[int],
        samples: list[bool],
        updates: list[BlockUpdate],
    ) -> Tensor:
        """Logits ``[R, V]`` of the requests that sample."""
        plan = StepPlan(
            step=0,
            new_rows=[],
            freed_slots=[],
            slots=slots,
            num_computed=num_computed,
            num_scheduled=num_scheduled,
            drafts=[[] for _ in slots],
            samples=samples,
            block_updates=updates,
        )
        self._tables.apply(plan)
        _, _, logits_RV = self.forward.run(plan)
        return logits_RV
