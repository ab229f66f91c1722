"""GraphShapes: which step sizes exist on the platform."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from dovetail.contracts.platform import Bucket, ShapePolicy

FEW = (1, 8, 64, 512)
"""What start-up tries when all kernels are there."""
_STEPS_PER_OCTAVE = 4
_SMALLEST_STEP = 8


class GraphShapes(ShapePolicy):
    """One size per number of tokens: requests are padded to as many, or to all that may run.

    Any mix of decodes, drafts and short prompts of up to n tokens shares the bucket ``(n, n)``, so there is one graph
    per rung. From 16 tokens on, a rung is at most a quarter above the one below.

    Args:
        every_size: whether start-up must meet every rung, since kernels are to be compiled.
    """

    static = True

    def __init__(self, max_tokens: int, max_requests: int, every_size: bool = True) -> None:
        self._tokens = rungs(max_tokens)
        self._max_requests = max_requests
        self._every_size = every_size

    def fit(self, num_tokens: int, num_requests: int) -> Bucket:
        """The next rung.

        Raises:
            ValueError: the step exceeds the largest one.
        """
        size = max(num_tokens, num_requests)
        if size > self._tokens[-1] or num_requests > self._max_requests:
            raise ValueError(f"{num_tokens} tokens of {num_requests} requests exceed the largest step.")
        tokens = self._tokens[bisect_left(self._tokens, size)]
        return Bucket(tokens, min(tokens, self._max_requests))

    def ladder(self) -> Sequence[Bucket]:
        """Every rung, or those of :data:`FEW`."""
        rungs = [tokens for tokens in reversed(self._tokens) if self._every_size or tokens in FEW]
        return [Bucket(tokens, min(tokens, self._max_requests)) for tokens in rungs]


def rungs(largest: int) -> list[int]:
    """1, 2, 4, 8, then steps of 8 or of a quarter of an octave, up to ``largest``, which need not be one of them."""
    sizes = [1, 2, 4]
    size = _SMALLEST_STEP
    while size < largest:
        sizes.append(size)
        octave = 1 << (size.bit_length() - 1)
        size += max(_SMALLEST_STEP, octave // _STEPS_PER_OCTAVE)
    return [*(size for size in sizes if size < largest), largest]
