"""Usage: the tokens of one request."""

from __future__ import annotations

from collections.abc import Iterable

from dovetail.engine.outputs import RequestOutput
from dovetail.server.responses import PromptTokensDetails, Usage


def usage(outputs: Iterable[RequestOutput]) -> Usage:
    """The sum over a request's prompts. A prompt counts once, however many completions it has."""
    prompt = completion = cached = 0
    for output in outputs:
        prompt += len(output.prompt_token_ids)
        cached += output.num_cached_tokens
        completion += sum(len(choice.token_ids) for choice in output.outputs)
    return Usage(prompt, completion, prompt + completion, PromptTokensDetails(cached))
