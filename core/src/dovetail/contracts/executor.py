"""Executor: everything below the scheduler. A vendor who wants all of it implements this alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import msgspec

from dovetail.messages import StepPlan, StepResult


class KVGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Layers whose KV pages live and die together.

    Attributes:
        layers: their indices.
        window: tokens that a query can see, or None for all. Pages wholly outside are freed.
    """

    layers: tuple[int, ...]
    window: int | None = None


class ExecutorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler must know, after loading.

    Attributes:
        num_blocks: KV blocks of every group's shared pool, the null block included.
        block_size: tokens per block.
        groups: KV groups; every group's page has the same number of bytes.
        page_bytes: bytes of one block over all layers of one group.
        draft_bytes: KV cache of a draft model beside these blocks.
        load_seconds, warm_up_seconds: for the start-up report.
    """

    num_blocks: int
    block_size: int
    groups: tuple[KVGroup, ...]
    page_bytes: int = 0
    draft_bytes: int = 0
    load_seconds: float = 0.0
    warm_up_seconds: float = 0.0


class Progress:
    """Receives start-up progress. The default ignores it."""

    def update(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total`` units of ``stage`` (``"load"`` or ``"warm-up"``) are finished."""


class Executor(ABC):
    """Runs steps."""

    @abstractmethod
    def load(self, progress: Progress) -> ExecutorInfo:
        """Load weights, allocate the cache, compile and warm up. Called once.

        Phase: load. Order: 1. Times: once. May raise: DovetailError.

        Raises:
            DovetailError: with what is wrong and what to change.
        """
        ...

    @abstractmethod
    def run(self, plan: StepPlan) -> StepResult:
        """Run one step. Plans arrive in order; the columns of the result match the plan's.

        Phase: step. Order: 2. Times: once, unless submit does it. May raise: anything, after which the engine is dead.
        """
        ...

    def submit(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Start one step, and return what waits for it and gives its result; results are read in the plans' order.

        With asynchronous scheduling the next plan is submitted before this one's result is read: it computes the token
        that this step samples, which it cannot name. An executor that cannot start without finishing runs the step.

        Phase: step. Order: 1. Times: once. May raise: anything, after which the engine is dead.
        """
        result = self.run(plan)
        return lambda: result

    @abstractmethod
    def close(self) -> None:
        """Release the device. Idempotent.

        Phase: end. Order: 1. Times: once or more. May raise: nothing.
        """
        ...
