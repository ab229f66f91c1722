"""Cloud TPUs as a platform. Its torch device is the host: only what is inside of compiled steps runs on the chip."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch

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
from dovetail.platforms.cpu import machine
from dovetail.sizes import size
from dovetail_tpu import bridges, detect
from dovetail_tpu.cache_key import cache_key
from dovetail_tpu.faults import explained
from dovetail_tpu.shapes import TpuShapes

if TYPE_CHECKING:
    from dovetail_tpu.bridges.protocol import Bridge
    from dovetail_tpu.program import Programs

T = TypeVar("T")

RESERVED = 8
"""Where a compiler does not say what programs take while they run, this part of a chip is set aside for it. The largest
that were compiled by one that says, of one layer of Llama-3.1-8B and 32 requests, take 50 MB of 16 GB.
"""
_logger = logging.getLogger("dovetail.tpu")


class TpuPlatform(Platform):
    """The TPU chips of this machine, or their programs executed on the host where a variable says so."""

    @classmethod
    def probe(cls) -> Probe:
        """Reads the files of the PCI bus, and looks which modules are there; imports none of them."""
        there = bridges.installed()
        if not there:
            return Probe(available=False, reason="no bridge from torch is installed; pip install 'dovetail-tpu[jax]'")
        chips = detect.chips()
        on_host = [name for name in there if detect.executes_on_host(name)]
        if not (chips or on_host):
            return Probe(
                available=False,
                reason="this machine has no TPU on its PCI bus; to execute programs on the host, set JAX_PLATFORMS=cpu",
            )
        where = ", ".join(f"{count} × {chip}" for chip, count in sorted(chips.items()))
        if on_host:
            where = f"none: programs execute on the host, by {detect.EXECUTES_ON_HOST[on_host[0]]}"
        return Probe(available=True, facts={"chips": where, "bridges": ", ".join(there)})

    def __init__(self, config: PlatformConfig, bridge: Bridge | None = None) -> None:
        """Open the bridge that the options name, or take one that is open already."""
        if config.num_threads is not None:
            if config.num_threads < 1:
                raise ConfigError(f"--num-threads is {config.num_threads}; it must be at least 1.")
            torch.set_num_threads(config.num_threads)
        if bridge is None:
            name, devices = (config.options.get(key, bridges.AUTO) for key in ("bridge", "devices"))
            bridge = bridges.open_bridge(name, _count(devices))
        if config.cache is not None:
            bridge.enable_cache(config.cache / cache_key(bridge, config.workload))
        self._bridge = bridges.use(bridge)
        self._programs = None if config.eager else _programs(bridge)

    @property
    def device(self) -> torch.device:
        """The host."""
        return torch.device("cpu")

    def memory(self) -> MemoryInfo:
        """Of all chips together, with the largest program compiled so far; or of the host, if it executes."""
        chip = self._bridge.memory()
        if chip is None:
            total, available = machine.memory()
            return MemoryInfo(total=total, available=available)
        if self._programs is not None:
            self._programs.pool.wait()
        temp = 0 if self._programs is None else _temp(self._programs, chip.total)
        chips = self._bridge.num_devices
        total, held, peak = chips * chip.total, chips * chip.held, chips * (chip.held + temp)
        return MemoryInfo(total=total, available=total - held, dedicated=True, held=held, peak=peak)

    @classmethod
    def default_dtype(cls, checkpoint_dtype: torch.dtype) -> torch.dtype:
        """The checkpoint's if it is fp32, else bf16: the chip does not multiply fp16."""
        return torch.float32 if checkpoint_dtype is torch.float32 else torch.bfloat16

    def ops(self, dtype: torch.dtype) -> Mapping[str, Callable[..., Any]]:
        """Those of :mod:`dovetail_tpu.ops`, which imports JAX."""
        from dovetail_tpu.ops import table

        return table()

    def shape_policy(self, max_tokens: int, max_requests: int) -> ShapePolicy:
        """Powers of two."""
        return TpuShapes(max_tokens, max_requests)

    def adopt(self, value: T) -> T:
        """On the chip, for programs; steps that run operation by operation leave weights on the host."""
        if self._programs is None:
            return value
        from dovetail_tpu.adopt import Adoption

        with explained(self._bridge.device_kind, "The model"):
            adopted: T = Adoption(self._bridge).of(value)
        return adopted

    def compile(self, step: StepFunction, bucket: Bucket) -> StepFunction:
        """A program."""
        if self._programs is None:
            return step
        from dovetail_tpu.program import Program

        return Program(step, bucket, self._programs)

    def await_compiled(self, told: Callable[[int, int], None]) -> None:
        """Until the threads have compiled every program."""
        if self._programs is not None:
            self._programs.pool.wait(told)
            if self._bridge.memory() is not None:
                self._programs.prove()

    def warmed_up(self) -> None:
        """All programs are there: compiling one from now on is an error."""
        if self._programs is not None:
            self._programs.complete()

    def close(self) -> None:
        """Programs that are not compiled yet are left alone."""
        if self._programs is not None:
            self._programs.pool.close()


def _temp(programs: Programs, total: int) -> int:
    """Bytes of a chip that programs take while they run."""
    if programs.is_measured:
        return programs.largest_temp
    reserved = max(programs.largest_temp, total // RESERVED)
    _logger.warning(
        "The compiler does not say what steps take: %s of each chip are set aside for them; --memory-fraction or "
        "--kv-cache-memory leave them more",
        size(reserved),
    )
    return reserved


def _programs(bridge: Bridge) -> Programs:
    from dovetail_tpu.program import Programs  # not before it was probed: JAX may not be installed

    return Programs(bridge)


def _count(devices: object) -> int | None:
    if devices == bridges.AUTO:
        return None
    if not isinstance(devices, int | str) or not str(devices).isdecimal():
        raise ConfigError(f"The platform's option devices is {devices!r}; it must be a number, or {bridges.AUTO}.")
    return int(devices)
