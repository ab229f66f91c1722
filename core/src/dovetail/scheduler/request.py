"""Request: everything the scheduler knows about one request."""

from __future__ import annotations

from enum import Enum
from hashlib import blake2b

from dovetail.kv.table import BlockTable
from dovetail.messages import EngineRequest, RequestTimes, TokenLogprobs


class RequestState(Enum):
    """WAITING → RUNNING → FINISHED; preemption leads back from RUNNING to WAITING."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Request:
    """One live request.

    The ledger: ``num_computed`` tokens are stored and verified, ``in_flight`` more were planned and not yet
    committed, ``token_ids`` are known, ``unread`` more were sampled or will be by planned steps, and ``drafts`` are
    guesses for what follows them. A plan starts at ``num_computed + in_flight``; a commit moves its tokens from
    ``in_flight`` to ``num_computed``, or drops those of rejected drafts, and reads what was sampled.

    Attributes:
        number: counts arrivals; unique.
        token_ids: prompt, then output.
        max_tokens: length at which generation ends.
        stops: tokens that end generation once ``min_stop_len`` tokens are exceeded.
        slot: row in the runner's tables while running.
        entered_step: the plan in which it last got a slot; results of earlier plans are stale.
        num_cached: prompt tokens found in the prefix cache at first admission; None before.
        prompt_logprobs: one entry per prompt token, until they are handed out.
    """

    __slots__ = (
        "drafts",
        "entered_step",
        "eos_token_ids",
        "first_scheduled",
        "first_token",
        "in_flight",
        "max_tokens",
        "message",
        "min_stop_len",
        "num_cached",
        "num_computed",
        "num_preemptions",
        "number",
        "params",
        "priority",
        "prompt_len",
        "prompt_logprobs",
        "request_id",
        "seed",
        "slot",
        "state",
        "stops",
        "table",
        "token_ids",
        "unread",
    )

    def __init__(
        self, message: EngineRequest, *, number: int, max_model_len: int, seed: int, table: BlockTable
    ) -> None:
        params = message.params
        self.message = message
        self.request_id = message.request_id
        self.params = params
        self.priority = message.priority
        self.number = number
        self.token_ids = list(message.prompt_token_ids)
        self.prompt_len = len(self.token_ids)
        self.max_tokens = longest_length(message, max_model_len)
        self.eos_token_ids = frozenset(() if params.ignore_eos else message.eos_token_ids)
        self.stops = self.eos_token_ids | frozenset(params.stop_token_ids)
        self.min_stop_len = self.prompt_len + params.min_tokens
        self.seed = request_seed(params.seed, seed, number)
        self.table = table
        self.state = RequestState.WAITING
        self.slot = -1
        self.entered_step = -1
        self.num_computed = 0
        self.in_flight = 0
        self.unread = 0
        self.drafts: list[int] = []
        self.num_cached: int | None = None
        self.num_preemptions = 0
        self.first_scheduled = 0.0
        self.first_token = 0.0
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * self.prompt_len

    def times(self, last_token: float) -> RequestTimes:
        """When it passed each stage; 0 for a stage it never reached."""
        return RequestTimes(
            arrival=self.message.arrival_time,
            first_scheduled=self.first_scheduled,
            first_token=self.first_token,
            last_token=last_token,
        )


def longest_length(message: EngineRequest, max_model_len: int) -> int:
    """Prompt plus output at which a request ends with ``"length"``."""
    if message.params.max_tokens is None:
        return max_model_len
    return min(max_model_len, len(message.prompt_token_ids) + message.params.max_tokens)


def request_seed(own: int | None, engine_seed: int, number: int) -> int:
    """The request's own seed, else one drawn from engine seed and arrival number; signed 64 bits."""
    if own is not None:
        return own - (1 << 64) if own >= 1 << 63 else own
    digest = blake2b(b"%d:%d" % (engine_seed, number), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
