"""NVIDIA GPUs through CUDA as a platform."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dovetail.contracts.platform import (
    Bucket,
    MemoryInfo,
    Platform,
    PlatformConfig,
    Probe,
    ShapePolicy,
    StepFunction,
)
from dovetail.errors import ConfigError
from dovetail_cuda.graphs import GraphPool, GraphStep
from dovetail_cuda.kernel_cache import KernelCache
from dovetail_cuda.shapes import GraphShapes
from dovetail_cuda.transfers import Transfers

if TYPE_CHECKING:
    from dovetail_cuda.compile_ahead import Compilers
    from dovetail_cuda.compile_worker import Workers

DRIVER = Path("/proc/driver/nvidia")
OLDEST = (8, 0)
"""Compute capability of the first chips that multiply bfloat16."""
GRAPHS = 48 << 20
"""What the driver keeps of graphs, 0.7 MB of each, and what is in pieces in the memory of small tensors."""


class CudaPlatform(Platform):
    """One GPU: the first that ``CUDA_VISIBLE_DEVICES`` shows."""

    @classmethod
    def probe(cls) -> Probe:
        """Asks the driver's files and its management library; no context is made."""
        if torch.version.cuda is None:
            return Probe(
                available=False,
                reason=f"torch {torch.__version__} is a build without CUDA; install one with it "
                "(https://pytorch.org/get-started/locally)",
            )
        count = torch.cuda.device_count()
        if not count:
            return Probe(available=False, reason=_why_none())
        return Probe(available=True, facts={"devices": str(count), "CUDA": torch.version.cuda, **_driver_facts()})

    def __init__(self, config: PlatformConfig) -> None:
        if config.num_threads is not None:
            if config.num_threads < 1:
                raise ConfigError(f"--num-threads is {config.num_threads}; it must be at least 1.")
            torch.set_num_threads(config.num_threads)
        self._device = torch.device("cuda", torch.cuda.current_device())
        capability = torch.cuda.get_device_capability(self._device)
        if capability < OLDEST:
            found, needed = (".".join(map(str, version)) for version in (capability, OLDEST))
            name = torch.cuda.get_device_name(self._device)
            raise ConfigError(f"{name} has compute capability {found}, and {needed} is needed; use another --platform.")
        torch.cuda.empty_cache()
        self._free_at_start, _ = torch.cuda.mem_get_info(self._device)
        self._pool = None if config.eager else GraphPool(self._device)
        self._transfers = Transfers(self._device)
        self._compilers: Compilers | None = None
        self._workers: Workers | None = None
        self._kernels = None if config.cache is None else KernelCache(config.cache, capability, config.workload)

    @property
    def device(self) -> torch.device:
        """The GPU."""
        return self._device

    def memory(self) -> MemoryInfo:
        """Free memory, with what torch keeps for allocations to come. Steps that run as graphs have a pool of their own
        beside what others take, as large as the largest step and its sampling.
        """
        torch.cuda.empty_cache()  # what is left of earlier tensors is in pieces, and the KV cache's are large
        free, total = torch.cuda.mem_get_info(self._device)
        reserved, allocated = torch.cuda.memory_reserved(self._device), torch.cuda.memory_allocated(self._device)
        step = torch.cuda.max_memory_reserved(self._device) - reserved  # with what lies idle between its tensors
        torch.cuda.reset_peak_memory_stats(self._device)
        if self._pool is not None:
            self._pool.set_aside(step)
        held = max(allocated, self._free_at_start - free - (reserved - allocated))
        return MemoryInfo(
            total=total,
            available=free + reserved - allocated,
            dedicated=True,
            held=held,
            peak=held + (step if self._pool is None else 2 * step + GRAPHS),
        )

    @classmethod
    def default_dtype(cls, checkpoint_dtype: torch.dtype) -> torch.dtype:
        """The checkpoint's, but never more than fp32."""
        known = (torch.bfloat16, torch.float16, torch.float32)
        return checkpoint_dtype if checkpoint_dtype in known else torch.float32

    def ops(self, dtype: torch.dtype) -> Mapping[str, Callable[..., Any]]:
        """Kernels in Triton."""
        from dovetail_cuda.ops import table  # Triton is there, or this platform would not have been chosen

        if self._kernels is not None and not (self._pool is None or self._kernels.is_complete or self._workers):
            from dovetail_cuda.compile_worker import Workers

            self._workers = Workers(self._kernels.folder)  # they import while others work
        return table()

    def shape_policy(self, max_tokens: int, max_requests: int) -> ShapePolicy:
        """One size per number of tokens."""
        return GraphShapes(max_tokens, max_requests, every_size=not self._has_all_kernels())

    def prepare(self, run: Callable[[], object]) -> None:
        """Compile together what it launches."""
        if self._pool is not None and not self._has_all_kernels():
            with self._compilers_for_all().left_out(), suppress(Exception):  # it fails again where its results count
                run()

    def staging(self, nbytes: int) -> Tensor:
        """Pinned memory."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def upload(self, host: Tensor) -> Tensor:
        """From pinned memory, in the order of the work."""
        return self._transfers.upload(host)

    def download(self, tensors: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
        """To pinned memory, beside the work."""
        return self._transfers.download(tensors)

    def compile(self, step: StepFunction, bucket: Bucket) -> StepFunction:
        """A graph, for large steps too: those of small models end before the host has launched all of their kernels."""
        if self._pool is None:
            return step
        run = GraphStep(step, self._pool)
        return run if self._has_all_kernels() else self._compiled_ahead(step, run, bucket)

    def _has_all_kernels(self) -> bool:
        return self._kernels is not None and self._kernels.is_complete

    def _compiled_ahead(self, step: StepFunction, run: StepFunction, bucket: Bucket) -> StepFunction:
        from dovetail_cuda.compile_ahead import CompiledAhead

        is_last = bucket.num_tokens == 1  # the ladder ends with the smallest
        return CompiledAhead(step, run, self._compilers_for_all(), is_last)

    def _compilers_for_all(self) -> Compilers:
        from dovetail_cuda.compile_ahead import Compilers
        from dovetail_cuda.sampling_ahead import sample_every_way

        if self._compilers is None:
            self._compilers = Compilers(sample_every_way, self._workers)
        return self._compilers

    def warmed_up(self) -> None:
        """All kernels are compiled: for the starts to come."""
        if self._compilers is not None:
            self._compilers.close()
        if self._kernels is not None and self._pool is not None:
            self._kernels.complete()

    def close(self) -> None:
        """Kernels that are not compiled yet are left alone, and the processes end."""
        if self._compilers is not None:
            self._compilers.drop()
        elif self._workers is not None:
            self._workers.kill()


def _why_none() -> str:
    if DRIVER.exists():
        return "the driver shows no GPU to this process; check CUDA_VISIBLE_DEVICES and nvidia-smi"
    return "this machine has no NVIDIA driver; install it, or give the container access to the GPU (docker --gpus all)"


def _driver_facts() -> Mapping[str, str]:
    """Names of the chips and the driver's version, where the driver tells them."""
    facts = {}
    models = [path.read_text() for path in sorted(DRIVER.glob("gpus/*/information"))]
    names = [match[1].strip() for text in models if (match := re.search(r"^Model:(.*)$", text, re.MULTILINE))]
    if names:
        facts["chips"] = ", ".join(names)
    version = DRIVER / "version"
    if version.exists() and (match := re.search(r"Kernel Module.*?(\d+\.[\d.]+)", version.read_text())):
        facts["driver"] = match[1]
    return facts
