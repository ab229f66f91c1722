"""Log-probabilities in the three shapes that clients read."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dovetail.engine.outputs import Logprob, LogprobsAtPosition
from dovetail.engine.tokenizer import Tokenizer
from dovetail.server.responses import (
    ChatLogprob,
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)

_LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot hold."""


class LogprobsWriter:
    """Writes log-probabilities of one request.

    Args:
        tokenizer: for the bytes of tokens.
        as_token_ids: write ``token_id:5`` instead of the token's text.
    """

    def __init__(self, tokenizer: Tokenizer, as_token_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_token_ids = as_token_ids

    def completion(
        self, token_ids: Sequence[int], positions: Sequence[LogprobsAtPosition | None], offset: int
    ) -> CompletionLogprobs:
        """Columns, for completions.

        Args:
            token_ids: the token at each position.
            positions: None where there is no log-probability: at the first token of a prompt.
            offset: characters before the first token.
        """
        columns = CompletionLogprobs([], [], [], [])
        for token_id, position in zip(token_ids, positions, strict=True):
            token = self._token(token_id, self._tokenizer.token_text(token_id))
            columns.text_offset.append(offset)
            offset += len(token)
            columns.tokens.append(token)
            columns.token_logprobs.append(None if position is None else finite(position[token_id].logprob))
            columns.top_logprobs.append(None if position is None else self._by_text(position))
        return columns

    def chat(self, token_ids: Sequence[int], positions: Sequence[LogprobsAtPosition], top: int) -> ChatLogprobs:
        """One entry per token, for chat, with the ``top`` most likely tokens at its place."""
        content = []
        for token_id, position in zip(token_ids, positions, strict=True):
            chosen = self._top(token_id, position[token_id])
            likely = sorted(position.items(), key=lambda item: (-item[1].logprob, item[1].rank or 0))[:top]
            content.append(
                ChatLogprob(
                    chosen.token, chosen.logprob, chosen.bytes, [self._top(other, entry) for other, entry in likely]
                )
            )
        return ChatLogprobs(content)

    @staticmethod
    def prompt(positions: Sequence[LogprobsAtPosition | None] | None) -> PromptLogprobs | None:
        """By token id, for ``prompt_logprobs``."""
        if positions is None:
            return None
        return [
            None
            if position is None
            else {
                token_id: PromptLogprob(finite(entry.logprob), entry.rank, entry.decoded_token)
                for token_id, entry in position.items()
            }
            for position in positions
        ]

    def _by_text(self, position: LogprobsAtPosition) -> dict[str, float]:
        """The chosen token comes first and stays when another one has the same text."""
        entries: dict[str, float] = {}
        for token_id, entry in position.items():
            entries.setdefault(self._token(token_id, entry.decoded_token or ""), finite(entry.logprob))
        return entries

    def _top(self, token_id: int, entry: Logprob) -> TopLogprob:
        token = self._token(token_id, entry.decoded_token or "")
        return TopLogprob(token, finite(entry.logprob), list(self._tokenizer.token_bytes(token_id)))

    def _token(self, token_id: int, text: str) -> str:
        return f"token_id:{token_id}" if self._as_token_ids else text


def finite(logprob: float) -> float:
    """A number that JSON can hold."""
    return logprob if math.isfinite(logprob) else _LOWEST
