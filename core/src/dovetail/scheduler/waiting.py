"""WaitingQueue: requests without a slot, in the policy's order."""

from __future__ import annotations

from heapq import heappop, heappush

from dovetail.scheduler.policy import SchedulingPolicy
from dovetail.scheduler.request import Request, RequestState


class WaitingQueue:
    """A heap by policy key. Aborted requests are dropped when they reach the top."""

    def __init__(self, policy: SchedulingPolicy) -> None:
        self._policy = policy
        self._heap: list[tuple[tuple[int, ...], Request]] = []

    def push(self, request: Request) -> None:
        """Add a new or preempted request."""
        heappush(self._heap, (self._policy.key(request), request))

    def peek(self) -> Request | None:
        """The request to admit next."""
        while self._heap and self._heap[0][1].state is not RequestState.WAITING:
            heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> None:
        """Remove what ``peek`` returned."""
        heappop(self._heap)
