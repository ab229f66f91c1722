"""The abacus as a platform."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dovetail.contracts.attention import StepTensors
from dovetail.contracts.platform import (
    Bucket,
    LadderShapes,
    MemoryInfo,
    Platform,
    PlatformConfig,
    Probe,
    ShapePolicy,
    StepFunction,
)
from dovetail.errors import ConfigError
from dovetail_abacus import device, kernels


class AbacusPlatform(Platform):
    """One size of program per power of two."""

    @classmethod
    def probe(cls) -> Probe:
        """Where torch takes devices written in Python, and no other device has taken the place."""
        obstacle = device.obstacle()
        return Probe(available=not obstacle, reason=obstacle, facts={"rods": str(os.cpu_count()), "beads": "wood"})

    def __init__(self, config: PlatformConfig) -> None:
        if config.num_threads is not None:
            if config.num_threads < 1:
                raise ConfigError(f"--num-threads is {config.num_threads}; an abacus needs at least 1 hand.")
            torch.set_num_threads(config.num_threads)
        self._device = device.install()

    @property
    def device(self) -> torch.device:
        """Its own."""
        return self._device

    def memory(self) -> MemoryInfo:
        """The beads are in host memory."""
        page = os.sysconf("SC_PAGE_SIZE")
        return MemoryInfo(
            total=os.sysconf("SC_PHYS_PAGES") * page, available=os.sysconf("SC_AVPHYS_PAGES") * page
        )

    @classmethod
    def default_dtype(cls, checkpoint_dtype: torch.dtype) -> torch.dtype:
        """Beads are exact."""
        return torch.float32

    def ops(self, dtype: torch.dtype) -> Mapping[str, Callable[..., Any]]:
        """The same in each dtype."""
        return kernels.table()

    def shape_policy(self, max_tokens: int, max_requests: int) -> ShapePolicy:
        """Powers of two."""
        return LadderShapes(tokens=_powers(max_tokens), requests=_powers(max_requests))

    def compile(self, step: StepFunction, bucket: Bucket) -> StepFunction:
        """A program, which runs at the sizes that it was made for."""
        return Program(step, bucket)


class Program:
    """A step at one size, as a compiler would make it: it refuses tensors of any other shape."""

    def __init__(self, step: StepFunction, bucket: Bucket) -> None:
        self._step = step
        self._bucket = bucket
        self._shapes: list[tuple[int, ...]] | None = None

    def __call__(self, step: StepTensors, metadata: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Hidden states and logits."""
        tensors = (step.token_ids_T, step.query_start_R1, step.logits_rows_S, *step.block_tables, *step.slot_mapping)
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if self._shapes is None:
            self._shapes = shapes
        if shapes != self._shapes:
            raise RuntimeError(f"the program for {self._bucket} takes {self._shapes}, and was given {shapes}")
        return self._step(step, metadata)


def _powers(largest: int) -> list[int]:
    """1, 2, 4 … and ``largest``, which need not be a power."""
    return [*(1 << i for i in range(largest.bit_length()) if 1 << i < largest), largest]
