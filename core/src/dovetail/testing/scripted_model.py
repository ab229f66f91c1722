"""ScriptedModel: a "language model" whose next token is a pure function of the tokens before it."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from zlib import crc32

from dovetail.messages import EngineRequest
from dovetail.sampling_params import SamplingParams

NextToken = Callable[[Sequence[int], int], int]
"""Tokens so far and a seed (0 for greedy requests) -> the next token."""


@dataclass(frozen=True, slots=True)
class ScriptedOutput:
    """What a request must produce: see :class:`dovetail.messages.RequestOutputDelta`."""

    token_ids: list[int]
    finish_reason: str
    stop_reason: int | None


class ScriptedModel:
    """Every token depends on all tokens before it, so that one wrong token changes everything after it.

    Args:
        vocab_size: tokens are below it.
        script: overrides the default, a checksum of the tokens.
    """

    def __init__(self, vocab_size: int, script: NextToken | None = None) -> None:
        self.vocab_size = vocab_size
        self._script = script if script is not None else self._checksum

    def next_token(
        self,
        token_ids: Sequence[int],
        prompt_len: int,
        params: SamplingParams,
        eos_token_ids: Sequence[int],
        seed: int,
    ) -> int:
        """The next token. A sampled request's depends on its seed; ``min_tokens`` masks stops."""
        token = self._script(token_ids, 0 if params.greedy else seed)
        if len(token_ids) - prompt_len < params.min_tokens:
            masked = {*eos_token_ids, *params.stop_token_ids}
            while token in masked:
                token = (token + 1) % self.vocab_size
        return token

    def complete(self, request: EngineRequest, max_model_len: int, seed: int = 0) -> ScriptedOutput:
        """Brute force: what an engine must answer, one token at a time.

        Args:
            seed: of a request that samples; ignored for a greedy one.
        """
        params, prompt = request.params, request.prompt_token_ids
        tokens = list(prompt)
        limit = max_model_len if params.max_tokens is None else len(prompt) + params.max_tokens
        while True:
            token = self.next_token(tokens, len(prompt), params, request.eos_token_ids, seed)
            tokens.append(token)
            output = tokens[len(prompt) :]
            if len(output) > params.min_tokens:
                if token in request.eos_token_ids and not params.ignore_eos:
                    return ScriptedOutput(output, "stop", None)
                if token in params.stop_token_ids:
                    return ScriptedOutput(output, "stop", token)
            if len(tokens) >= min(limit, max_model_len):
                return ScriptedOutput(output, "length", None)

    def _checksum(self, token_ids: Sequence[int], seed: int) -> int:
        return crc32(array("Q", token_ids).tobytes(), seed & 0xFFFFFFFF) % self.vocab_size
