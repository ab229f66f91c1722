"""Scheduler: plans steps and commits their results."""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Iterable, Sequence

from dovetail.config import EngineConfig
from dovetail.contracts.executor import ExecutorInfo
from dovetail.errors import ConfigError
from dovetail.kv.manager import KVCacheManager, TableUpdate
from dovetail.messages import (
    EngineRequest,
    EngineStats,
    RequestOutputDelta,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from dovetail.scheduler.counters import Counters
from dovetail.scheduler.plan_builder import PlanBuilder
from dovetail.scheduler.policy import policy_named
from dovetail.scheduler.request import Request, RequestState
from dovetail.scheduler.stopping import FINISH_ABORT, append_until_stop
from dovetail.scheduler.waiting import WaitingQueue

RUNNING = RequestState.RUNNING


class Scheduler:
    """Shares one token budget per step among all requests.

    There is no prefill or decode phase: each request has computed and known tokens, and every step lets the
    first catch up with the second. Running requests come first, then waiting ones, both in the policy's
    order. Out of blocks, the last running request is preempted: its blocks are freed, and it is computed
    again later.

    Args:
        config: limits, policy and switches.
        info: the executor's pool.

    Raises:
        ConfigError: limits that contradict each other.
    """

    def __init__(self, config: EngineConfig, info: ExecutorInfo) -> None:
        if not config.enable_chunked_prefill and config.max_num_batched_tokens < config.max_model_len:
            raise ConfigError(
                f"--max-num-batched-tokens is {config.max_num_batched_tokens}, but without chunked prefill a "
                f"step must hold a whole prompt of --max-model-len {config.max_model_len}. "
                "Raise it, or enable chunked prefill."
            )
        self.kv = KVCacheManager(
            info,
            enable_caching=config.enable_prefix_caching,
            max_step_tokens=min(config.max_num_batched_tokens, config.max_model_len),
            seed=config.seed,
        )
        self._config = config
        self._policy = policy_named(config.scheduling_policy)
        self._waiting = WaitingQueue(self._policy)
        self._running: list[Request] = []
        self._requests: dict[str, Request] = {}
        self._free_slots = list(reversed(range(config.max_num_seqs)))
        self._freed_slots: list[int] = []
        self._in_flight: dict[int, list[Request]] = {}
        self._aborted: list[RequestOutputDelta] = []
        self._arrivals = 0
        self._step = 0
        self._counters = Counters()

    def add(self, message: EngineRequest) -> None:
        """Queue a request. The caller has checked that it can ever run."""
        request = Request(
            message,
            number=self._arrivals,
            max_model_len=self._config.max_model_len,
            seed=self._config.seed,
            table=self.kv.new_table(message.cache_salt, message.prompt_token_ids),
        )
        self._arrivals += 1
        self._requests[request.request_id] = request
        self._waiting.push(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests at once, in any state; unknown ids are ignored. Deltas come with the next commit."""
        now = time.time()
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is None:
                continue
            if request.state is RUNNING:
                self._running.remove(request)
            self._aborted.append(
                RequestOutputDelta(
                    request_id=request_id,
                    new_token_ids=[],
                    finish_reason=FINISH_ABORT,
                    num_cached_tokens=request.num_cached or 0,
                    num_preemptions=request.num_preemptions,
                    times=request.times(now),
                )
            )
            self._finish(request)

    def take_aborted(self) -> list[RequestOutputDelta]:
        """Deltas of requests aborted since the last call."""
        aborted, self._aborted = self._aborted, []
        return aborted

    def has_work(self) -> bool:
        """Whether a request is live, or an abort is still to be reported."""
        return bool(self._requests or self._aborted)

    def is_live(self, request_id: str) -> bool:
        """Whether a request of this id waits or runs."""
        return request_id in self._requests

    def stats(self) -> EngineStats:
        """Gauges now, and counters since the start."""
        counters = self._counters
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._requests) - len(self._running),
            kv_usage=self.kv.pool.usage,
            num_preemptions=counters.num_preemptions,
            prefix_queries=counters.prefix_queries,
            prefix_hits=counters.prefix_hits,
            prompt_tokens=counters.prompt_tokens,
            generation_tokens=counters.generation_tokens,
            drafts_proposed=counters.drafts_proposed,
            drafts_accepted=counters.drafts_accepted,
            steps=counters.steps,
            step_tokens=counters.step_tokens,
        )

    def plan(self) -> StepPlan | None:
        """The next step's work, or None if there is nothing to compute."""
        builder = PlanBuilder(self._step, self._config.max_num_batched_tokens, self._config.async_scheduling)
        preempted = self._counters.num_preemptions
        self._plan_running(builder)
        if self._counters.num_preemptions == preempted:
            self._plan_waiting(builder)
        plan = builder.build(self._freed_slots)
        if plan is not None:
            self._in_flight[self._step] = builder.requests
            self._freed_slots = []
            self._step += 1
            self._counters.steps += 1
            self._counters.step_tokens += self._config.max_num_batched_tokens - builder.budget
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[RequestOutputDelta]:
        """Take a step's outcome: verified tokens, ends, and drafts for the next step."""
        now = time.time()
        deltas = self.take_aborted()
        finished = False
        for index, request in enumerate(self._in_flight.pop(plan.step)):
            if request.state is not RUNNING or request.entered_step > plan.step:
                continue  # aborted or preempted while the step ran
            delta = self._commit_row(request, plan, result, index, now)
            if delta is not None:
                deltas.append(delta)
                finished = finished or delta.finish_reason is not None
        if finished:
            self._running = [request for request in self._running if request.state is RUNNING]
        return deltas

    # --- planning ---

    def _plan_running(self, builder: PlanBuilder) -> None:
        slides, running = self.kv.slides, self._running
        for position, request in enumerate(running, 1):  # preemption takes from the end, and never what is planned
            if builder.budget <= 0:
                return
            start = request.num_computed + request.in_flight
            known = len(request.token_ids) + request.unread
            count = known + len(request.drafts) - start
            if count <= 0 or known >= request.max_tokens:  # nothing to compute, or its last token is on its way
                continue
            if count > 1:  # each later one keeps a token, lest drafts or a long prompt starve them
                count = min(count, max(1, builder.budget - (len(running) - position)))
            table = request.table
            if start + count > table.capacity or (slides and start >= table.slides_at):
                count = self._make_room(builder, request, start, count)
                if count == 0:
                    return
            self._schedule(builder, request, start, count)

    def _schedule(self, builder: PlanBuilder, request: Request, start: int, count: int) -> None:
        """Plan ``count`` tokens, and offer the pages that they fill to whoever comes later in this very plan.

        A step stores the keys and values of all its tokens before it attends to any, so sixteen prompts that arrive
        together compute their common prefix once.
        """
        builder.schedule(request, start, count)
        if start + count >= request.table.full_at:
            self._cache(request, start + count)

    def _make_room(self, builder: PlanBuilder, request: Request, start: int, count: int) -> int:
        """Free pages that slid out of a window, and find blocks for ``count`` tokens.

        If there are too few, give up the request's drafts, then preempt from the tail.

        Returns:
            Tokens that now fit; 0 if the request itself had to be preempted.
        """
        table, known = request.table, len(request.token_ids) + request.unread
        updates: list[TableUpdate] = []
        if self.kv.slides and start >= table.slides_at:
            updates = self.kv.slide(table, start)
        while (grown := self.kv.grow(table, start + count)) is None:
            if start + count > known:
                request.drafts = []
                count = known - start
                continue
            victim = self._running.pop()
            self._preempt(victim)
            if victim is request:
                return 0
        builder.update_blocks(request.slot, updates + grown)
        return count

    def _preempt(self, request: Request) -> None:
        """Take back slot and blocks; the request waits with its tokens, and is computed again."""
        self._leave_slot(request)
        request.state = RequestState.WAITING
        request.num_computed = 0
        request.in_flight = request.unread = 0  # what was not read yet is sampled again, and is the same
        request.drafts = []
        request.num_preemptions += 1
        self._counters.num_preemptions += 1
        self._waiting.push(request)

    def _plan_waiting(self, builder: PlanBuilder) -> None:
        while builder.budget > 0 and self._free_slots and (request := self._waiting.peek()) is not None:
            if not self._admit(request, builder):
                return

    def _admit(self, request: Request, builder: PlanBuilder) -> bool:
        """Give a request a slot, its cached prefix and blocks, if all of its known tokens fit.

        Blocks that it does not take at once stay free for it: while budget is left for others, every running
        request has caught up with its known tokens.
        """
        kv, known = self.kv, len(request.token_ids)
        pages = 0 if request.prompt_logprobs is not None else kv.find_prefix(request.table, known)
        start = pages * kv.block_size
        count = min(known - start, builder.budget)
        if not self._config.enable_chunked_prefill and count < known - start:
            return False
        if kv.blocks_to_admit(request.table, known, pages) > kv.pool.num_free:
            return False
        self._waiting.pop()
        kv.adopt(request.table, pages)
        kv.grow(request.table, start + count)
        request.state = RUNNING
        request.slot = self._free_slots.pop()
        request.entered_step = self._step
        request.num_computed = start
        if request.num_cached is None:
            self._first_admission(request, start)
        insort(self._running, request, key=self._policy.key)
        builder.enter(request)
        self._schedule(builder, request, start, count)
        return True

    def _first_admission(self, request: Request, num_cached: int) -> None:
        request.num_cached = num_cached
        request.first_scheduled = time.time()
        if self._config.enable_prefix_caching and request.prompt_logprobs is None:
            self._counters.prefix_queries += request.prompt_len
            self._counters.prefix_hits += num_cached

    # --- committing ---

    def _commit_row(
        self, request: Request, plan: StepPlan, result: StepResult, index: int, now: float
    ) -> RequestOutputDelta | None:
        """Move one request's tokens from in flight to computed, and add what was sampled."""
        count, new = plan.num_scheduled[index], result.token_ids[index]
        request.in_flight -= count
        request.unread -= self._config.async_scheduling and plan.samples[index]
        request.num_computed += count
        if request.prompt_logprobs is not None:
            first = plan.num_computed[index] + 1
            _collect_prompt_logprobs(request.prompt_logprobs, first, result.prompt_logprobs[index])
        if index in result.errors:
            return self._fail(request, result.errors[index], now)
        if not new:
            return None
        if drafts := plan.drafts[index]:
            request.num_computed -= len(drafts) + 1 - len(new)
            self._counters.drafts_proposed += len(drafts)
            self._counters.drafts_accepted += len(new) - 1
        delta = self._accept(request, new, result.logprobs[index], now)
        if request.num_computed >= request.table.full_at:
            self._cache(request, request.num_computed)
        if delta.finish_reason is not None:
            self._finish(request)
        elif proposal := result.drafts[index]:
            request.drafts = proposal[: max(0, request.max_tokens - len(request.token_ids) - 1)]
        return delta

    def _fail(self, request: Request, error: str, now: float) -> RequestOutputDelta:
        """End a request that cannot go on. Its pages may hold the cause, so nobody else may build on them."""
        self.kv.forget(request.table)
        self._finish(request)
        return RequestOutputDelta(
            request_id=request.request_id,
            new_token_ids=[],
            finish_reason="error",
            error=error,
            num_cached_tokens=request.num_cached or 0,
            num_preemptions=request.num_preemptions,
            times=request.times(now),
        )

    def _cache(self, request: Request, num_computed: int) -> None:
        """Offer pages that became full with known tokens: not with drafts, nor with what follows a stop."""
        self.kv.cache(request.table, request.token_ids, min(num_computed, len(request.token_ids)))

    def _accept(
        self, request: Request, new: list[int], logprobs: list[TokenLogprobs] | None, now: float
    ) -> RequestOutputDelta:
        """Append sampled tokens until one ends the request."""
        kept, finish_reason, stop_reason = append_until_stop(request, new)
        if not request.first_token:
            request.first_token = now
            self._counters.prompt_tokens += request.prompt_len
        self._counters.generation_tokens += kept
        prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None
        return RequestOutputDelta(
            request_id=request.request_id,
            new_token_ids=new if kept == len(new) else new[:kept],
            logprobs=logprobs[:kept] if logprobs is not None else None,
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            num_cached_tokens=request.num_cached or 0,
            num_preemptions=request.num_preemptions,
            times=request.times(now) if finish_reason is not None else None,
        )

    def _finish(self, request: Request) -> None:
        if request.state is RUNNING:
            self._leave_slot(request)
        request.state = RequestState.FINISHED
        del self._requests[request.request_id]

    def _leave_slot(self, request: Request) -> None:
        self.kv.release(request.table)
        self._free_slots.append(request.slot)
        self._freed_slots.append(request.slot)
        request.slot = -1


def _collect_prompt_logprobs(
    collected: list[TokenLogprobs | None], first: int, chunk: Sequence[TokenLogprobs] | None
) -> None:
    """Store a chunk from prompt position ``first``; one computed again after preemption overwrites itself."""
    if chunk:
        collected[first : first + len(chunk)] = chunk
