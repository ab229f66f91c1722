"""The platform: the host's processor, with two step sizes and one operation of its own."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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


class FossilPlatform(Platform):
    """Runs on the host, in fp32."""

    @classmethod
    def probe(cls) -> Probe:
        if not hasattr(os, "sysconf"):
            return Probe(available=False, reason="this system does not tell its memory; use another --platform")
        return Probe(available=True, facts={"layers": "12"})

    def __init__(self, config: PlatformConfig) -> None:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def memory(self) -> MemoryInfo:
        page = os.sysconf("SC_PAGE_SIZE")
        total, available = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
        return MemoryInfo(total=total, available=available)

    @classmethod
    def default_dtype(cls, checkpoint_dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def ops(self, dtype: torch.dtype) -> Mapping[str, Callable[..., Any]]:
        return {"silu_and_mul": silu_and_mul}

    def shape_policy(self, max_tokens: int, max_requests: int) -> ShapePolicy:
        # one size for decoding, one for prompts
        return LadderShapes(tokens=(max_requests, max_tokens), requests=(max_requests,))

    def compile(self, step: StepFunction, bucket: Bucket) -> StepFunction:
        return step  # or capture a graph, or torch.compile(step, dynamic=False)


def silu_and_mul(x_T2F: Tensor) -> Tensor:
    """See the reference operation of this name."""
    gate_TF, up_TF = x_T2F.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF
