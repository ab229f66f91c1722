"""PlanBuilder: collects the columns of one step plan and keeps its token budget."""

from __future__ import annotations

from collections.abc import Iterable

from dovetail.kv.manager import TableUpdate
from dovetail.messages import NewRow, StepPlan
from dovetail.scheduler.request import Request

_NO_DRAFTS: list[int] = []
"""One for all plans: nobody changes a plan, and a new list for each row and step keeps the garbage collector busy."""


class PlanBuilder:
    """One plan in the making.

    Args:
        ahead: whether later plans may go on from tokens that this one samples, before they are read.

    Attributes:
        budget: tokens that may still be scheduled.
        requests: per column entry, the request it describes.
    """

    def __init__(self, step: int, budget: int, ahead: bool) -> None:
        self.budget = budget
        self._ahead = ahead
        self.requests: list[Request] = []
        self._step = step
        self._new_rows: list[NewRow] = []
        self._slots: list[int] = []
        self._num_computed: list[int] = []
        self._num_scheduled: list[int] = []
        self._drafts: list[list[int]] = []
        self._samples: list[bool] = []
        self._block_updates: list[tuple[int, int, int, list[int]]] = []

    def schedule(self, request: Request, start: int, count: int) -> None:
        """Compute ``count`` tokens of a request from position ``start``, its drafts at the end."""
        beyond = start + count - len(request.token_ids) - request.unread
        self.requests.append(request)
        self._slots.append(request.slot)
        self._num_computed.append(start)
        self._num_scheduled.append(count)
        self._samples.append(beyond >= 0)
        request.unread += self._ahead and beyond >= 0
        self._drafts.append(request.drafts[:beyond] if beyond > 0 else _NO_DRAFTS)
        if request.drafts:
            request.drafts = []
        request.in_flight += count
        self.budget -= count

    def enter(self, request: Request) -> None:
        """A request takes a slot, with every token it knows and the blocks it holds."""
        self._new_rows.append(
            NewRow(
                slot=request.slot,
                request_id=request.request_id,
                token_ids=request.token_ids.copy(),
                prompt_len=request.prompt_len,
                params=request.params,
                eos_token_ids=request.message.eos_token_ids,
                seed=request.seed,
                block_ids=[ids.copy() for ids in request.table.blocks],
                extras=request.message.extras,
            )
        )

    def update_blocks(self, slot: int, updates: Iterable[TableUpdate]) -> None:
        """A row's block table changed."""
        for group, first, block_ids in updates:
            self._block_updates.append((slot, group, first, block_ids))

    def build(self, freed_slots: list[int]) -> StepPlan | None:
        """The plan, or None if nothing was scheduled."""
        if not self.requests:
            return None
        return StepPlan(
            step=self._step,
            new_rows=self._new_rows,
            freed_slots=freed_slots,
            slots=self._slots,
            num_computed=self._num_computed,
            num_scheduled=self._num_scheduled,
            drafts=self._drafts,
            samples=self._samples,
            block_updates=self._block_updates,
        )
