"""Engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from dovetail.config import EngineConfig
from dovetail.contracts.executor import Executor, ExecutorInfo
from dovetail.engine.validation import check_request, check_room
from dovetail.errors import RequestError
from dovetail.messages import EngineRequest, EngineStats, RequestOutputDelta, StepPlan, StepResult
from dovetail.scheduler.scheduler import Scheduler


class Engine:
    """Joins a scheduler and a loaded executor. Not thread-safe: one thread calls everything.

    Args:
        config: the resolved configuration.
        executor: loaded; closed by :meth:`close`.
        info: what its ``load`` returned.

    Raises:
        ConfigError: limits that contradict each other.
    """

    def __init__(self, config: EngineConfig, executor: Executor, info: ExecutorInfo) -> None:
        self._config = config
        self._executor = executor
        self._ahead = 1 if config.async_scheduling else 0
        self._submitted: deque[tuple[StepPlan, Callable[[], StepResult]]] = deque()
        self._scheduler = Scheduler(config, info)

    def add(self, request: EngineRequest, *, prompt_checked: bool = False) -> None:
        """Queue a request.

        Args:
            prompt_checked: whether the caller has run :func:`dovetail.engine.validation.check_prompt` on it, under
                this engine's limits; over a thousand long prompts it takes a while.

        Raises:
            ContextLengthError: its prompt leaves no room for output.
            RequestError: it could never run here, or its id is in use.
        """
        if self._scheduler.is_live(request.request_id):
            message = f"Request id {request.request_id!r} is in use; choose another."
            raise RequestError(message, param="request_id")
        (check_room if prompt_checked else check_request)(request, self._config, self._scheduler.kv)
        self._scheduler.add(request)

    def abort(self, request_ids: Sequence[str]) -> None:
        """End requests at once and free what they hold; ids that are not live are ignored.

        The next :meth:`step` reports each with finish reason ``"abort"``.
        """
        self._scheduler.abort(request_ids)

    def step(self) -> list[RequestOutputDelta]:
        """Submit one step and take the outcome of the oldest; without work, return at once.

        With asynchronous scheduling a step is planned and submitted while the one before it still runs, so the first
        call of a busy period brings no tokens, and the last ones only read.

        Raises:
            Exception: whatever the executor raises; the engine is then dead.
        """
        plan = self._scheduler.plan()
        if plan is not None:
            self._submitted.append((plan, self._executor.submit(plan)))
        if not self._submitted or (plan is not None and len(self._submitted) <= self._ahead):
            return self._scheduler.take_aborted()
        oldest, read = self._submitted.popleft()
        return self._scheduler.commit(oldest, read())

    def has_work(self) -> bool:
        """Whether :meth:`step` has anything to do or to report."""
        return self._scheduler.has_work() or bool(self._submitted)

    def stats(self) -> EngineStats:
        """Gauges now, and counters since the start."""
        return self._scheduler.stats()

    def close(self) -> None:
        """Close the executor. Idempotent."""
        self._executor.close()
