"""When a request ends: end-of-sequence, its own stop tokens, and its length."""

from __future__ import annotations

from collections.abc import Sequence

from dovetail.scheduler.request import Request

FINISH_STOP = "stop"
FINISH_LENGTH = "length"
FINISH_ABORT = "abort"


def append_until_stop(request: Request, new: Sequence[int]) -> tuple[int, str | None, int | None]:
    """Append new tokens up to and including the one that ends the request.

    Returns:
        How many were kept, the finish reason or None, and the stop token if one of ``stop_token_ids`` ended
        it.
    """
    token_ids = request.token_ids
    for kept, token in enumerate(new, 1):
        token_ids.append(token)
        if token in request.stops and len(token_ids) > request.min_stop_len:
            return kept, FINISH_STOP, None if token in request.eos_token_ids else token
        if len(token_ids) >= request.max_tokens:
            return kept, FINISH_LENGTH, None
    return len(new), None, None
