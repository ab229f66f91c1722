"""What a caller gets back. Names follow vLLM's, so that code written for it keeps working."""

from __future__ import annotations

from dataclasses import dataclass, field

from dovetail.messages import RequestTimes


@dataclass(slots=True)
class Logprob:
    """One token's log-probability, its rank (1 is the most likely), and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


LogprobsAtPosition = dict[int, Logprob]
"""Token id -> log-probability; the chosen token first, then the most likely ones in order."""


@dataclass(slots=True)
class CompletionOutput:
    """One completion of one prompt.

    Attributes:
        index: which of the request's ``n`` completions.
        text, token_ids: everything generated so far.
        logprobs: one entry per token, if asked for.
        finish_reason: ``"stop"``, ``"length"``, ``"abort"``, ``"error"``, or None while running.
        stop_reason: the stop string or stop token id that ended it; None for end-of-sequence.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[LogprobsAtPosition] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestOutput:
    """The state of one request.

    Attributes:
        prompt: the prompt's text, if it came as text.
        prompt_logprobs: one entry per prompt token (the first is None), if asked for.
        outputs: one entry per completion.
        finished: whether every completion has a finish reason.
        num_cached_tokens: prompt tokens found in the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[LogprobsAtPosition | None] | None = None
    finished: bool = False
    num_cached_tokens: int = 0
    times: RequestTimes | None = None
    error: str | None = None
