"""TpuShapes: which step sizes there are, all of which are compiled before serving."""

from __future__ import annotations

from collections.abc import Sequence

from dovetail.contracts.platform import Bucket, ShapePolicy

FEWEST_TOKENS = 16
"""Of a step: rows of bfloat16 fill registers of 16."""


class TpuShapes(ShapePolicy):
    """Powers of two of tokens; requests are padded to as many, or to all that may run.

    Any mix of decodes, drafts and prompts of up to n tokens shares one size, so there is one program per rung. Requests
    that are padding cost a row of logits each, and attention nothing.
    """

    static = True
    whole = True

    def __init__(self, max_tokens: int, max_requests: int) -> None:
        self._tokens = [FEWEST_TOKENS]
        while self._tokens[-1] < max_tokens:
            self._tokens.append(2 * self._tokens[-1])
        self._max_requests = max_requests

    def fit(self, num_tokens: int, num_requests: int) -> Bucket:
        """The next rung.

        Raises:
            ValueError: the step exceeds the largest one.
        """
        size = max(num_tokens, num_requests)
        if size > self._tokens[-1] or num_requests > self._max_requests:
            raise ValueError(f"{num_tokens} tokens of {num_requests} requests exceed the largest step.")
        return self._bucket(next(tokens for tokens in self._tokens if tokens >= size))

    def ladder(self) -> Sequence[Bucket]:
        """Every rung."""
        return [self._bucket(tokens) for tokens in reversed(self._tokens)]

    def _bucket(self, tokens: int) -> Bucket:
        return Bucket(tokens, min(tokens, self._max_requests))
