"""Slots: one fixed row per request in the device tables, updated by small diffs, gathered by index each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dovetail.contracts.attention import StepTensors
from dovetail.contracts.platform import Bucket, Platform
from dovetail.messages import NULL_BLOCK, NewRow, StepPlan

ALIGNMENT = 16
"""Bytes."""
_GAP = np.zeros(ALIGNMENT, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class StepRows:
    """Host-side index arithmetic of one plan.

    Attributes:
        slots_R: slot of each request.
        positions_T: position of each token in its request.
        request_T: which request each token belongs to.
        query_start_R1: first token of each request, and the total.
        logits_rows_S: rows that need logits: the last ``1 + drafts`` of each request that samples.
        sampling: the requests that sample.
    """

    slots_R: np.ndarray
    positions_T: np.ndarray
    request_T: np.ndarray
    query_start_R1: np.ndarray
    seq_lens_R: np.ndarray
    logits_rows_S: np.ndarray
    sampling: np.ndarray

    @classmethod
    def of(cls, plan: StepPlan) -> StepRows:
        """Expand the plan's columns; vectorised over requests."""
        slots_R = np.array(plan.slots, dtype=np.int64)
        computed_R = np.array(plan.num_computed, dtype=np.int64)
        if plan.num_scheduled == [1] * len(slots_R):  # decoding: most steps, and the shortest
            each_R1 = np.arange(len(slots_R) + 1)
            sampling = np.flatnonzero(plan.samples)
            return cls(slots_R, computed_R, each_R1[:-1], each_R1, computed_R + 1, sampling, sampling)
        scheduled_R = np.array(plan.num_scheduled, dtype=np.int64)
        query_start_R1 = np.zeros(len(slots_R) + 1, dtype=np.int64)
        np.cumsum(scheduled_R, out=query_start_R1[1:])
        request_T = np.repeat(np.arange(len(slots_R)), scheduled_R)
        positions_T = np.arange(query_start_R1[-1]) + (computed_R - query_start_R1[:-1])[request_T]
        return cls(
            slots_R=slots_R,
            positions_T=positions_T,
            request_T=request_T,
            query_start_R1=query_start_R1,
            seq_lens_R=computed_R + scheduled_R,
            logits_rows_S=_logits_rows(plan, query_start_R1),
            sampling=np.flatnonzero(plan.samples),
        )


def _logits_rows(plan: StepPlan, query_start_R1: np.ndarray) -> np.ndarray:
    samples = np.array(plan.samples, dtype=bool)
    ends: np.ndarray = query_start_R1[1:][samples]
    if not any(plan.drafts):
        ends -= 1
        return ends
    counts = np.array([1 + len(d) for d, s in zip(plan.drafts, plan.samples, strict=True) if s], dtype=np.int64)
    first: np.ndarray = np.repeat(ends - counts, counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    first += within
    return first


class SlotTables:
    """Device tables of every request in a slot.

    Attributes:
        tokens_SL: int64 ``[max_num_seqs, max_model_len + 1]`` known tokens: prompt, output, then drafts in flight.
        num_tokens_S: int64 verified tokens of each slot (host).
        block_tables: per KV group int32 ``[max_num_seqs + 1, blocks per sequence]`` (device); the last row is nobody's,
            for padding.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        num_groups: int,
        platform: Platform,
        beside: SlotTables | None = None,
    ) -> None:
        """Empty tables; with ``beside``, the tables of another model, both know the same tokens."""
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self._block_size = block_size
        self._platform = platform
        device = self._device = platform.device
        self._tokens: Tensor
        if beside is None:
            self._tokens = torch.zeros(max_num_seqs + 1, max_model_len + 1, dtype=torch.int64, device=device)
        else:
            self._tokens = beside._tokens
        self.tokens_SL = self._tokens[:max_num_seqs]
        self._next: tuple[Tensor, Tensor] | None = None
        self.num_tokens_S = np.zeros(max_num_seqs, dtype=np.int64)
        blocks = -(-max_model_len // block_size)
        shape = (max_num_seqs + 1, blocks)
        self.block_tables = [torch.full(shape, NULL_BLOCK, dtype=torch.int32, device=device) for _ in range(num_groups)]

    def apply(self, plan: StepPlan) -> None:
        """Apply the plan's diffs: rows that enter, blocks that were added, drafts to verify."""
        if plan.new_rows:
            self._enter(plan.new_rows)
        for group, table in enumerate(self.block_tables):
            pieces = [(slot, first, ids) for slot, of, first, ids in plan.block_updates if of == group]
            self._put(table, pieces)
        drafted = [(slot, drafts) for slot, drafts in zip(plan.slots, plan.drafts, strict=True) if drafts]
        self._put(self.tokens_SL, [(slot, int(self.num_tokens_S[slot]), drafts) for slot, drafts in drafted])

    def append(self, slots: Sequence[int], token_ids: Sequence[Sequence[int]]) -> None:
        """Append verified tokens, one list per slot."""
        known = self.num_tokens_S[slots].tolist()
        self._put(self.tokens_SL, list(zip(slots, known, token_ids, strict=True)))
        self.num_tokens_S[slots] += [len(ids) for ids in token_ids]

    def append_sampled(self, rows: StepRows, tokens_R: Tensor) -> None:
        """Append a token to each request that samples in the step gathered last; the host need not know which."""
        assert self._next is not None, "no step was gathered"
        self.tokens_SL[self._next] = tokens_R
        self.num_tokens_S[rows.slots_R[rows.sampling]] += 1

    def write(self, slots_R: np.ndarray, positions_R: np.ndarray, tokens_R: Tensor) -> None:
        """Put one token of the device into each slot."""
        rows_R, columns_R = self._upload(slots_R, positions_R)
        self.tokens_SL[rows_R, columns_R] = tokens_R

    def step_tensors(self, rows: StepRows, bucket: Bucket, num_logits: int | None) -> StepTensors:
        """Gather one step's tables, padded to the bucket.

        Args:
            num_logits: rows of logits to pad to, for a step of static shapes; None keeps what the step needs.
        """
        max_seq_len = int(rows.seq_lens_R.max())
        query_len = int((rows.query_start_R1[1:] - rows.query_start_R1[:-1]).max())
        num_pages = -(-max_seq_len // self._block_size) if num_logits is None else None
        nobody, size = self.max_num_seqs, self._block_size
        query_start_R1, seq_lens_R = self._upload(
            _padded(rows.query_start_R1, bucket.num_requests + 1, fill=int(rows.query_start_R1[-1])),
            _padded(rows.seq_lens_R, bucket.num_requests),
            dtype=np.int32,
        )
        positions = _padded(rows.positions_T, bucket.num_tokens)
        slots_R, slots_T, positions_T, pages_T, offsets_T, logits_rows_S, *place = self._upload(
            _padded(rows.slots_R, bucket.num_requests, fill=nobody),
            _padded(rows.slots_R[rows.request_T], bucket.num_tokens, fill=nobody),
            positions,
            positions // size,
            positions % size,
            _padded(rows.logits_rows_S, num_logits or len(rows.logits_rows_S)),
            rows.slots_R[rows.sampling],
            rows.seq_lens_R[rows.sampling],
        )
        self._next = (place[0], place[1])
        blocks = [table[slots_T, pages_T] for table in self.block_tables]
        return StepTensors(
            token_ids_T=self._tokens[slots_T, positions_T],
            positions_T=positions_T,
            query_start_R1=query_start_R1,
            seq_lens_R=seq_lens_R,
            block_tables=[table[slots_R, :num_pages] for table in self.block_tables],
            slot_mapping=[torch.add(offsets_T, blocks_T, alpha=size) for blocks_T in blocks],
            logits_rows_S=logits_rows_S,
            max_query_len=query_len,
            max_seq_len=max_seq_len,
        )

    def targets(self, rows: StepRows, bucket: Bucket) -> Tensor:
        """int64 ``[T]``: the token after each of a step's, as far as it is known; padded to the bucket."""
        slots_T, next_T = self._upload(
            _padded(rows.slots_R[rows.request_T], bucket.num_tokens, fill=self.max_num_seqs),
            _padded(rows.positions_T + 1, bucket.num_tokens),
        )
        return self._tokens[slots_T, next_T]

    def padding_step(self, bucket: Bucket, num_logits: int) -> StepTensors:
        """A step of padding alone: what warm-up compiles and runs."""
        zeros_T, zeros_R, starts_R1, rows_S = (
            torch.zeros(size, dtype=torch.int64, device=self._device)
            for size in (bucket.num_tokens, bucket.num_requests, bucket.num_requests + 1, num_logits)
        )
        return StepTensors(
            token_ids_T=zeros_T,
            positions_T=zeros_T,
            query_start_R1=starts_R1.to(torch.int32),
            seq_lens_R=zeros_R.to(torch.int32),
            block_tables=[torch.full_like(table[zeros_R], NULL_BLOCK) for table in self.block_tables],
            slot_mapping=[zeros_T for _ in self.block_tables],
            logits_rows_S=rows_S,
            max_query_len=0,
            max_seq_len=0,
        )

    def _enter(self, rows: Sequence[NewRow]) -> None:
        slots = np.array([row.slot for row in rows])
        self._put(self.tokens_SL, [(row.slot, 0, row.token_ids) for row in rows])
        self.num_tokens_S[slots] = [len(row.token_ids) for row in rows]
        (slots_R,) = self._upload(slots)
        for group, table in enumerate(self.block_tables):
            table.index_fill_(0, slots_R, NULL_BLOCK)
            self._put(table, [(row.slot, 0, row.block_ids[group]) for row in rows])

    def _put(self, table_SL: Tensor, pieces: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """Write pieces ``(slot, first column, values)``, in one copy however many there are."""
        counts = [len(values) for _, _, values in pieces]
        if not sum(counts):
            return
        ends = np.cumsum(counts)
        columns = np.repeat([first for _, first, _ in pieces] - ends + counts, counts) + np.arange(ends[-1])
        values = np.fromiter(chain.from_iterable(piece[2] for piece in pieces), np.int64, ends[-1])
        rows_N, columns_N, values_N = self._upload(np.repeat([slot for slot, _, _ in pieces], counts), columns, values)
        table_SL[rows_N, columns_N] = values_N.to(table_SL.dtype)

    def _upload(self, *columns: np.ndarray, dtype: type[np.integer[Any]] = np.int64) -> Sequence[Tensor]:
        """Several columns in one copy: to a device, each costs as much as all of them. Each begins at a multiple of
        ``ALIGNMENT``, as tensors of their own do, so that no compiler sees a difference.
        """
        step = ALIGNMENT // np.dtype(dtype).itemsize
        parts = [part for column in columns for part in (column, _GAP[: -len(column) % step])]
        packed = torch.from_numpy(np.concatenate(parts, dtype=dtype, casting="same_kind"))
        return torch.split(self._platform.upload(packed), [len(part) for part in parts])[::2]


def _padded(values: np.ndarray, size: int, fill: int = 0) -> np.ndarray:
    if len(values) == size:
        return values
    padded = np.full(size, fill, dtype=np.int64)
    padded[: len(values)] = values
    return padded
