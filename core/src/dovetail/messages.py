"""Messages: the seams between server, scheduler and executor. Torch-free, immutable, msgspec-encodable.

Three pairs:
- ``EngineRequest`` / ``RequestOutputDelta``: server ↔ engine, one request in, its new tokens out.
- ``StepPlan`` / ``StepResult``: scheduler ↔ executor, one step's work and its outcome.
- ``extras``: a mapping from a plugin's name to its own payload, so that nobody patches or subclasses a message.
"""

from __future__ import annotations

from typing import Any

import msgspec

from dovetail.sampling_params import SamplingParams

MESSAGES_VERSION = 1

Extras = dict[str, Any]


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One prompt for which the engine generates one completion.

    Attributes:
        request_id: unique among live requests.
        prompt_token_ids: at least one token.
        params: sampling parameters with ``n == 1``; stop strings are the caller's business.
        eos_token_ids: the model's end-of-sequence tokens.
        priority: lower runs first under the priority policy.
        arrival_time: ``time.time()`` at the server.
        cache_salt: prefix-cache blocks are shared only among equal salts.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    priority: int = 0
    arrival_time: float = 0.0
    cache_salt: str | None = None
    extras: Extras = {}


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probabilities at one position.

    Attributes:
        token_id: the token at this position (chosen, or the prompt's own).
        logprob: its log-probability.
        rank: 1 for the most likely token.
        top_ids, top_logprobs: the most likely tokens, in order; they need not contain ``token_id``.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class RequestTimes(msgspec.Struct, frozen=True, array_like=True):
    """When a request passed each stage, in ``time.time()`` seconds."""

    arrival: float
    first_scheduled: float
    first_token: float
    last_token: float


class RequestOutputDelta(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """What one step added to one request.

    Attributes:
        new_token_ids: tokens of this step; empty with a finish reason on abort.
        logprobs: one entry per new token, if asked for.
        prompt_logprobs: one entry per prompt token (the first is None), with the first delta, if asked for.
        finish_reason: ``"stop"``, ``"length"``, ``"abort"``, ``"error"``, or None while running.
        stop_reason: the stop token id that ended it, if one of ``stop_token_ids`` did.
        num_cached_tokens: prompt tokens found in the prefix cache.
        num_preemptions: how often it was preempted so far.
        times: set with the finish reason.
        error: the reason, with finish reason ``"error"``.
    """

    request_id: str
    new_token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    times: RequestTimes | None = None
    error: str | None = None


class NewRow(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A request that enters a slot in this step (new, or resumed after preemption).

    Attributes:
        slot: its row in the runner's tables until it leaves.
        token_ids: every token known so far: prompt, then output.
        prompt_len: how many of them are prompt.
        block_ids: per KV group, the blocks held so far (prefix hits and new ones).
    """

    slot: int
    request_id: str
    token_ids: list[int]
    prompt_len: int
    params: SamplingParams
    eos_token_ids: tuple[int, ...]
    seed: int
    block_ids: list[list[int]]
    extras: Extras = {}


class StepPlan(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One step's work, in columns: entry ``i`` of each per-request column describes the same request.

    Attributes:
        step: counts up from 0.
        new_rows: requests that enter a slot.
        freed_slots: slots whose requests left since the previous plan (finished, aborted or preempted).
        slots: the requests that compute in this step.
        num_computed: tokens whose KV is already stored.
        num_scheduled: tokens to compute now, starting at ``num_computed``; drafts included.
        drafts: draft tokens to verify, each list a suffix of the scheduled tokens.
        samples: whether this step reaches the request's last known token, so that a token is sampled.
        block_updates: ``(slot, group, first_index, block_ids)``: blocks appended to rows already in a slot. An id of
            ``NULL_BLOCK`` marks a page that slid out of the window.
    """

    step: int
    new_rows: list[NewRow]
    freed_slots: list[int]
    slots: list[int]
    num_computed: list[int]
    num_scheduled: list[int]
    drafts: list[list[int]]
    samples: list[bool]
    block_updates: list[tuple[int, int, int, list[int]]]
    extras: Extras = {}
    version: int = MESSAGES_VERSION

    @property
    def total_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(self.num_scheduled)


class StepResult(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The outcome of one plan; columns match ``StepPlan.slots``.

    Attributes:
        token_ids: tokens produced: none (still in prefill), one, or accepted drafts plus one.
        drafts: the speculator's proposals for the next step.
        logprobs: per request that asked, one entry per produced token; None elsewhere.
        prompt_logprobs: per request that asked, entries for prompt positions ``num_computed + 1 …`` of this chunk.
        errors: column -> why that request cannot go on (its logits are NaN, say); it has no tokens.
    """

    step: int
    token_ids: list[list[int]]
    drafts: list[list[int]]
    logprobs: list[list[TokenLogprobs] | None]
    prompt_logprobs: list[list[TokenLogprobs] | None]
    errors: dict[int, str] = {}
    extras: Extras = {}
    version: int = MESSAGES_VERSION


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Counters and gauges of the engine, sent with every batch of outputs. Counters only grow."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    num_preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    drafts_proposed: int = 0
    drafts_accepted: int = 0
    steps: int = 0
    step_tokens: int = 0


NULL_BLOCK = 0
"""Block 0 is never handed out: it pads block tables and stands for pages outside a sliding window."""
