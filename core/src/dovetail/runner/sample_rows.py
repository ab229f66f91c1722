"""SampleRows: which rows of logits belong to which request of a step. Index arithmetic on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dovetail.messages import StepPlan

NO_TOKEN = -1
"""Stands for "no token here" in padded tables."""


@dataclass(frozen=True, slots=True)
class SampleRows:
    """The rows of logits of one step: each request that samples has one, and one more per draft.

    Attributes:
        columns: the plan's columns that sample, in order.
        slots_R, starts_R: slot and first row of each of them.
        slots_S: slot of each row.
        positions_S: index, in its request, of the token that each row predicts.
        drafts_S: the draft at that index, or ``NO_TOKEN`` on a request's last row.
        drafts: the same by request.
    """

    columns: list[int]
    slots_R: np.ndarray
    starts_R: np.ndarray
    slots_S: np.ndarray
    positions_S: np.ndarray
    drafts_S: np.ndarray
    drafts: list[list[int]]

    @classmethod
    def of(cls, plan: StepPlan) -> SampleRows:
        """Read a plan."""
        columns = [i for i, samples in enumerate(plan.samples) if samples]
        drafts = [plan.drafts[i] for i in columns]
        ends_R = np.array([plan.num_computed[i] + plan.num_scheduled[i] for i in columns], dtype=np.int64)
        return cls.build(columns, [plan.slots[i] for i in columns], ends_R, drafts)

    @classmethod
    def build(
        cls, columns: list[int], slots: Sequence[int], ends_R: np.ndarray, drafts: list[list[int]]
    ) -> SampleRows:
        """Expand requests into rows; ``ends_R`` counts each request's tokens with its drafts."""
        slots_R = np.array(slots, dtype=np.int64)
        if not any(drafts):
            nothing_S = np.full(len(slots_R), NO_TOKEN)
            return cls(columns, slots_R, np.arange(len(slots_R)), slots_R, ends_R, nothing_S, drafts)
        counts_R = np.array([len(d) + 1 for d in drafts], dtype=np.int64)
        starts_R = np.cumsum(counts_R) - counts_R
        request_S = np.repeat(np.arange(len(slots_R)), counts_R)
        first_R = ends_R - counts_R + 1
        return cls(
            columns=columns,
            slots_R=slots_R,
            starts_R=starts_R,
            slots_S=slots_R[request_S],
            positions_S=np.arange(counts_R.sum()) + (first_R - starts_R)[request_S],
            drafts_S=np.array([token for d in drafts for token in (*d, NO_TOKEN)], dtype=np.int64),
            drafts=drafts,
        )

    def padded(self, num_rows: int, num_requests: int, nobody: int) -> SampleRows:
        """With rows and requests of the slot ``nobody`` behind them."""
        rows, requests = num_rows - len(self.slots_S), num_requests - len(self.slots_R)
        return replace(
            self,
            slots_R=np.pad(self.slots_R, (0, requests), constant_values=nobody),
            starts_R=np.pad(self.starts_R, (0, requests)),
            slots_S=np.pad(self.slots_S, (0, rows), constant_values=nobody),
            positions_S=np.pad(self.positions_S, (0, rows)),
            drafts_S=np.pad(self.drafts_S, (0, rows), constant_values=NO_TOKEN),
        )

    @property
    def has_drafts(self) -> bool:
        """Whether any request verifies drafts."""
        return len(self.slots_S) > len(self.slots_R)

    @property
    def max_drafts(self) -> int:
        """The most drafts of one request."""
        return max(map(len, self.drafts), default=0)

    def earlier_drafts(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The drafts that come before each of the given rows, as pairs (index into ``rows``, token)."""
        before_S = np.arange(len(self.slots_S)) - np.repeat(self.starts_R, [len(d) + 1 for d in self.drafts])
        counts = before_S[rows]
        index = np.repeat(np.arange(len(rows)), counts)
        offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return index, self.drafts_S[(rows - counts)[index] + offset]

    def all_earlier_drafts(self, most: int) -> np.ndarray:
        """``[S, most]``: the drafts before each row, the latest first, then ``NO_TOKEN``."""
        counts = [len(d) + 1 for d in self.drafts]
        before_S = np.zeros(len(self.slots_S), dtype=np.int64)
        before_S[: sum(counts)] = np.arange(sum(counts)) - np.repeat(self.starts_R[: len(counts)], counts)
        back_K = np.arange(most)
        rows_SK = np.arange(len(self.slots_S))[:, None] - 1 - back_K
        earlier: np.ndarray = np.where(back_K < before_S[:, None], self.drafts_S[rows_SK.clip(0)], NO_TOKEN)
        return earlier
