"""Engines for tests: a configuration without a model, requests without noise, and a loop until idle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import msgspec

from dovetail.config import EngineConfig, Selection
from dovetail.contracts.executor import Progress
from dovetail.engine.engine import Engine
from dovetail.messages import EngineRequest, RequestOutputDelta, RequestTimes, TokenLogprobs
from dovetail.sampling_params import SamplingParams
from dovetail.testing.scripted_executor import ScriptedExecutor

_IDS = count()


def engine_config(**changes: Any) -> EngineConfig:
    """A small configuration for a scripted executor; ``changes`` are fields of :class:`EngineConfig`."""
    part = Selection(name="scripted", target="", distribution="dovetail-core", version="0", why="for a test")
    config = EngineConfig(
        model_path="",
        model_name="scripted",
        hf_config={},
        model=part,
        platform=part,
        attention=part,
        quant=part,
        spec_decoder=None,
        dtype="float32",
        kv_dtype="float32",
        vocab_size=100,
        eos_token_ids=(),
        max_model_len=64,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        block_size=4,
        kv_cache_memory=None,
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
        scheduling_policy="fcfs",
        seed=0,
        num_threads=None,
    )
    return msgspec.structs.replace(config, **changes)


def engine_request(
    prompt_token_ids: Sequence[int],
    *,
    request_id: str | None = None,
    eos_token_ids: tuple[int, ...] = (),
    priority: int = 0,
    cache_salt: str | None = None,
    **params: Any,
) -> EngineRequest:
    """A greedy request with a fresh id; ``params`` are fields of :class:`SamplingParams`."""
    return EngineRequest(
        request_id=request_id if request_id is not None else f"request-{next(_IDS)}",
        prompt_token_ids=list(prompt_token_ids),
        params=SamplingParams(**{"temperature": 0.0, **params}),
        eos_token_ids=eos_token_ids,
        priority=priority,
        cache_salt=cache_salt,
    )


def scripted_engine(config: EngineConfig, **executor: Any) -> tuple[Engine, ScriptedExecutor]:
    """An engine over a :class:`ScriptedExecutor` made with the keyword arguments."""
    scripted = ScriptedExecutor(config, **executor)
    return Engine(config, scripted, scripted.load(Progress())), scripted


@dataclass(slots=True)
class Completion:
    """Everything that an engine said about one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    times: RequestTimes | None = None

    def extend(self, delta: RequestOutputDelta) -> None:
        """Add one step's delta. Nothing may follow a finish reason."""
        assert self.finish_reason is None, f"{delta.request_id}: a delta after {self.finish_reason!r}"
        assert delta.prompt_logprobs is None or not self.token_ids
        self.token_ids += delta.new_token_ids
        self.logprobs += delta.logprobs or []
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        self.num_cached_tokens, self.num_preemptions = delta.num_cached_tokens, delta.num_preemptions
        self.times = delta.times


def run_until_idle(engine: Engine, max_steps: int = 10_000) -> dict[str, Completion]:
    """Step until nothing is left.

    Raises:
        AssertionError: work is left after ``max_steps``: the scheduler makes no progress.
    """
    completions: dict[str, Completion] = {}
    for _ in range(max_steps):
        if not engine.has_work():
            return completions
        for delta in engine.step():
            completions.setdefault(delta.request_id, Completion()).extend(delta)
    raise AssertionError(f"work is left after {max_steps} steps: {engine.stats()}")
