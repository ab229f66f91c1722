"""The CPU as a platform: torch for tensors, native kernels for the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dovetail.contracts.platform import (
    Bucket,
    ExactShapes,
    MemoryInfo,
    Platform,
    PlatformConfig,
    Probe,
    ShapePolicy,
    StepFunction,
)
from dovetail.errors import ConfigError
from dovetail.platforms.cpu import kernels, machine
from dovetail.platforms.cpu.ops import NATIVE_DTYPES, CpuOps

GIB = 1 << 30


class CpuPlatform(Platform):
    """Every machine has it; it is also the oracle that other platforms are compared with."""

    @classmethod
    def probe(cls) -> Probe:
        """Always available; the facts say which kernels it runs on."""
        isas = kernels.built_isas()
        total, available = machine.memory()
        return Probe(
            available=True,
            facts={
                "cpu": machine.cpu_name(),
                "cores": str(machine.usable_cores()),
                "bf16": "native" if machine.computes_bf16() else "emulated",
                "native kernels": isas[0] if isas else f"absent: {kernels.missing_reason()}",
                "memory": f"{available / GIB:.1f} of {total / GIB:.1f} GiB available",
            },
        )

    def __init__(self, config: PlatformConfig) -> None:
        threads = config.num_threads if config.num_threads is not None else machine.usable_cores()
        if threads < 1:
            raise ConfigError(f"--num-threads is {threads}; it must be at least 1.")
        self._kernels = kernels.load() if kernels.built_isas() else None
        if self._kernels is not None:
            self._kernels.set_threads(threads)
        # One pool computes. Torch's own threads would spin for milliseconds after each of its parallel operations, on
        # the cores that the kernels need; what is left to torch in a step is small.
        torch.set_num_threads(threads if self._kernels is None else 1)

    @property
    def device(self) -> torch.device:
        """Host memory."""
        return torch.device("cpu")

    def memory(self) -> MemoryInfo:
        """Of the machine, or of the container that limits this process."""
        total, available = machine.memory()
        return MemoryInfo(total=total, available=available)

    @classmethod
    def default_dtype(cls, checkpoint_dtype: torch.dtype) -> torch.dtype:
        """The checkpoint's if it is fp32, or bf16 that the CPU multiplies itself; else fp32, which loses nothing."""
        if checkpoint_dtype == torch.bfloat16 and machine.computes_bf16():
            return torch.bfloat16
        return torch.float32

    def ops(self, dtype: torch.dtype) -> Mapping[str, Callable[..., Any]]:
        """Native kernels for bf16 and fp32; other dtypes, and machines without kernels, run on the reference."""
        if self._kernels is None or dtype not in NATIVE_DTYPES:
            return {}
        return CpuOps(self._kernels, dtype).table()

    def shape_policy(self, max_tokens: int, max_requests: int) -> ShapePolicy:
        """No padding, and nothing to compile: one small step proves that the model runs."""
        return ExactShapes([Bucket(1, 1)])

    def compile(self, step: StepFunction, bucket: Bucket) -> StepFunction:
        """Runs as it is."""
        return step
