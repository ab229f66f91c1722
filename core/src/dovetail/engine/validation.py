"""Whether a request can ever run on this engine."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dovetail.config import EngineConfig
from dovetail.errors import ContextLengthError, RequestError
from dovetail.kv.manager import KVCacheManager
from dovetail.messages import EngineRequest
from dovetail.sampling_params import SamplingParams
from dovetail.scheduler.request import longest_length


def check_request(message: EngineRequest, config: EngineConfig, kv: KVCacheManager) -> None:
    """Check everything that would otherwise surface in the middle of a step.

    Raises:
        ContextLengthError: the prompt leaves no room for output. RequestError: an empty prompt, a token that
        the model does not have, or a sequence larger than the KV cache.
    """
    check_prompt(message.prompt_token_ids, message.params, config.vocab_size, config.max_model_len)
    check_room(message, config, kv)


def check_room(message: EngineRequest, config: EngineConfig, kv: KVCacheManager) -> None:
    """Check that the KV cache can hold a request whose prompt was checked.

    Raises:
        RequestError: it cannot, even without any other.
    """
    length = longest_length(message, config.max_model_len)
    needed, total = kv.most_blocks(length - 1), kv.pool.num_blocks - 1
    if needed > total:
        raise RequestError(
            f"{length} tokens of prompt and output need {needed} KV blocks, and the cache has {total}. "
            "Lower max_tokens, shorten the prompt, or start the server with a larger --kv-cache-memory.",
            param="max_tokens",
        )


def check_prompt(prompt: Sequence[int], params: SamplingParams, vocab_size: int, max_model_len: int) -> None:
    """Check what needs no engine: front ends call this before they send a request.

    Raises:
        ContextLengthError: the prompt leaves no room for output. RequestError: an empty prompt, a token
        that is no integer or that the model does not have, or more ``min_tokens`` than there is room for.
    """
    if not prompt:
        raise RequestError("The prompt is empty; give at least one token.", param="prompt")
    _check_tokens("prompt", prompt, vocab_size)
    _check_tokens("stop_token_ids", params.stop_token_ids, vocab_size)
    _check_tokens("allowed_token_ids", params.allowed_token_ids or (), vocab_size)
    _check_tokens("logit_bias", params.logit_bias or (), vocab_size)
    if len(prompt) >= max_model_len:
        output = params.max_tokens or 1
        raise ContextLengthError(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested "
            f"{len(prompt) + output} tokens ({len(prompt)} in the prompt, {output} for the output). "
            "Shorten the prompt.",
            param="prompt",
        )
    room = max_model_len - len(prompt)
    if params.min_tokens > room:
        raise RequestError(
            f"min_tokens is {params.min_tokens}, but a prompt of {len(prompt)} tokens leaves room for {room} in this "
            f"model's context of {max_model_len}. Lower it, or shorten the prompt.",
            param="min_tokens",
        )


def _check_tokens(name: str, token_ids: Collection[int], vocab_size: int) -> None:
    kinds = [kind for kind in set(map(type, token_ids)) if not hasattr(kind, "__index__")]
    if kinds:
        wrong = next(token for token in token_ids if type(token) in kinds)
        message = f"{name} contains {wrong!r}, which is no integer; this model's tokens are 0 to {vocab_size - 1}."
        raise RequestError(message, param=name)
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
        message = f"{name} contains token {wrong}; this model's tokens are 0 to {vocab_size - 1}."
        raise RequestError(message, param=name)
