"""The platform: reference operations, one kernel of its own, and two step sizes."""

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
from dovetail.errors import ConfigError


class SketchPlatform(Platform):
    """Runs on the host, in fp32."""

    @classmethod
    def probe(cls) -> Probe:
        """Whether this machine can run it; must not touch the device."""
        if not hasattr(os, "sysconf"):
            return Probe(available=False, reason="this system does not tell its memory; use another --platform")
        return Probe(available=True, facts={"cores": str(os.cpu_count())})

    def __init__(self, config: PlatformConfig) -> None:
        if config.num_threads is not None:
            if config.num_threads < 1:
                raise ConfigError(f"--num-threads is {config.num_threads}; it must be at least 1.")
            torch.set_num_threads(config.num_threads)

    @property
    def device(self) -> torch.device:
        """Where weights, KV cache and step tensors live."""
        return torch.device("cpu")

    def memory(self) -> MemoryInfo:
        """On the device, now."""
        page = os.sysconf("SC_PAGE_SIZE")
        total, available = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
        return MemoryInfo(total=total, available=available)

    @classmethod
    def default_dtype(cls, checkpoint_dtype: torch.dtype) -> torch.dtype:
        """One of the manifest's."""
        return torch.float32

    def ops(self, dtype: torch.dtype) -> Mapping[str, Callable[..., Any]]:
        """The kernels; every other operation is the reference."""
        return {"silu_and_mul": silu_and_mul}

    def shape_policy(self, max_tokens: int, max_requests: int) -> ShapePolicy:
        """One size for decoding, one for prompts."""
        return LadderShapes(tokens=(max_requests, max_tokens), requests=(max_requests,))

    def compile(self, step: StepFunction, bucket: Bucket) -> StepFunction:
        """Runs the step as it is; here a graph would be captured, or a program compiled."""
        return step


def silu_and_mul(x_T2F: Tensor) -> Tensor:
    """See the reference operation of this name."""
    gate_TF, up_TF = x_T2F.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF
