"""Platforms for tests: the reference operations on the host, with exact or padded shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dovetail.contracts.platform import (
    Bucket,
    ExactShapes,
    LadderShapes,
    MemoryInfo,
    Platform,
    PlatformConfig,
    Probe,
    ShapePolicy,
    StepFunction,
)

GIB = 1 << 30


class ReferencePlatform(Platform):
    """Overrides nothing: every operation is the reference implementation. Use with ``--attention reference``."""

    @classmethod
    def probe(cls) -> Probe:
        """Always available."""
        return Probe(available=True)

    def __init__(self, config: PlatformConfig) -> None:
        """Nothing to initialise."""

    @property
    def device(self) -> torch.device:
        """The host."""
        return torch.device("cpu")

    def memory(self) -> MemoryInfo:
        """A fixed size, so that tests see the same cache everywhere."""
        return MemoryInfo(total=4 * GIB, available=4 * GIB)

    @classmethod
    def default_dtype(cls, checkpoint_dtype: torch.dtype) -> torch.dtype:
        """Always float32."""
        return torch.float32

    def ops(self, dtype: torch.dtype) -> Mapping[str, Callable[..., Any]]:
        """No overrides."""
        return {}

    def shape_policy(self, max_tokens: int, max_requests: int) -> ShapePolicy:
        """Exact shapes."""
        return ExactShapes(list(dict.fromkeys([Bucket(max_tokens, max_requests), Bucket(1, 1)])))

    def compile(self, step: StepFunction, bucket: Bucket) -> StepFunction:
        """Unchanged."""
        return step


class LadderPlatform(ReferencePlatform):
    """Pads every step to a ladder of sizes, as chips with graphs or ahead-of-time compilers need, and checks it.

    Attributes:
        compiled: every step and bucket that was compiled, in order; a draft model has a step of its own.
    """

    def __init__(self, config: PlatformConfig) -> None:
        super().__init__(config)
        self.compiled: list[tuple[StepFunction, Bucket]] = []
        self._shapes: dict[tuple[StepFunction, Bucket], Any] = {}

    def shape_policy(self, max_tokens: int, max_requests: int) -> ShapePolicy:
        """Powers of two, up to the largest step."""
        return LadderShapes(tokens=_powers(max_tokens), requests=_powers(max_requests))

    def compile(self, step: StepFunction, bucket: Bucket) -> StepFunction:
        """Wrap the step so that a wrong shape fails the test; a step's bucket is compiled once."""
        key = (step, bucket)
        assert key not in self.compiled, f"{bucket} compiled twice"
        self.compiled.append(key)
        shapes = self._shapes

        def checked(tensors: Any, metadata: Any) -> Any:
            assert len(tensors.token_ids_T) == bucket.num_tokens, (len(tensors.token_ids_T), bucket)
            assert len(tensors.seq_lens_R) == bucket.num_requests, (len(tensors.seq_lens_R), bucket)
            shape = (tensors.logits_rows_S.shape, *(table.shape for table in tensors.block_tables))
            assert shapes.setdefault(key, shape) == shape, (shapes[key], shape)
            return step(tensors, metadata)

        return checked


def _powers(size: int) -> list[int]:
    powers = [1]
    while powers[-1] < size:
        powers.append(min(2 * powers[-1], size))
    return powers
