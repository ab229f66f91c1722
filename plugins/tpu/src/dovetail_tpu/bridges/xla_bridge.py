"""The bridge over torch_xla: torch's lazy tensors, whose programs are captured once."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import jax
import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr
from torch import Tensor

from dovetail.errors import ConfigError
from dovetail_tpu.bridges import jax_op
from dovetail_tpu.bridges.capture import XLAC, Buffer, CapturedProgram, Started, capture
from dovetail_tpu.bridges.corrections import Corrections
from dovetail_tpu.bridges.host_constants import HostConstants
from dovetail_tpu.bridges.host_maps import room
from dovetail_tpu.bridges.protocol import ChipMemory, Kernel, Spec, State, Step
from dovetail_tpu.faults import explained

CACHE = "XLA_PERSISTENT_CACHE_PATH"
"""Where torch_xla remembers its folder."""
PROGRAMS = "XLA_COMPILATION_CACHE_SIZE"
"""Where torch_xla looks up how many programs it keeps; of those not used for longest it forgets."""
FEW = 64
"""That it keeps where they execute on the host, where :mod:`~dovetail_tpu.bridges.host_maps` are few. An engine has
fewer programs.
"""
COMPILED_WITH = ("torch", "torch_xla", "jax", "jaxlib", "libtpu")

_logger = logging.getLogger("dovetail.tpu")


class XlaBridge:
    """See :class:`~dovetail_tpu.bridges.protocol.Bridge`. It runs on one device."""

    name = "torch_xla"
    num_devices = 1

    def __init__(self) -> None:
        jax.config.update("jax_platforms", "cpu")  # the chip is torch_xla's
        XLAC._xla_set_mat_mul_precision("highest")  # of fp32; bf16 is as it is
        if xr.device_type() == "CPU":
            os.environ.setdefault(PROGRAMS, str(FEW))  # it is read when the first is compiled
        self._device = torch_xla.device()
        self._numbers = itertools.count()
        self._buffers: WeakValueDictionary[int, Buffer] = WeakValueDictionary()
        self._is_tracing = False
        self.device_kind = "cpu" if xr.device_type() == "CPU" else XLAC._xla_device_kind(str(self._device))
        self.versions = tuple(f"{package} {_version(package)}" for package in COMPILED_WITH)

    @classmethod
    def open(cls, devices: int | None = None) -> XlaBridge:
        """Open a chip; or the host's processor, if ``PJRT_DEVICE`` says so.

        Args:
            devices: that programs are spread over: one.

        Raises:
            ConfigError: there are to be more.
        """
        if devices not in (None, 1):
            raise ConfigError(
                f"The bridge torch_xla runs on one device, not {devices}. Take the bridge jax for more, or 1 device."
            )
        return cls()

    @torch.inference_mode(False)
    @torch.no_grad()
    def adopt(self, host: Tensor, spec: Spec = ()) -> Tensor:
        """A copy on the chip, all of it on the one device."""
        tensor = host.detach().to(self._device)
        self._buffers[next(self._numbers)] = tensor
        return tensor

    def spec_of(self, tensor: Any) -> Spec:
        """Nothing is split."""
        return ()

    @torch.inference_mode(False)
    @torch.no_grad()
    def allocate(self, shape: Sequence[int], dtype: torch.dtype, spec: Spec = ()) -> State:
        """Zeros, made on the chip."""
        with explained(self.device_kind, "The KV cache"):
            state = State(torch.zeros(*shape, dtype=dtype, device=self._device))
            torch_xla.sync()
            xm.wait_device_ops()  # else want of memory would be told where something else is computed
        self._buffers[next(self._numbers)] = state
        return state

    @torch.inference_mode(False)
    @torch.no_grad()
    def apply(self, function: Kernel, *tensors: Tensor, states: Sequence[State] = (), **static: Any) -> list[Tensor]:
        """A function of JAX, lowered to HLO for the chip, as one operation."""
        operands = [*(state.tensor for state in states), *(tensor.to(self._device) for tensor in tensors)]
        outputs = jax_op.call(function, operands, static, self.device_kind)
        for state, tensor in zip(states, outputs, strict=False):
            state.tensor = tensor
        results = outputs[len(states) :]
        if self._is_tracing:
            return results
        torch_xla.sync()
        return _fetched(results)

    @torch.inference_mode(False)
    @torch.no_grad()
    def trace(self, step: Step, words: int) -> CapturedProgram:
        """Trace and compile: torch_xla compiles what it has traced last.

        Raises:
            ConfigError: there is no room for it on the host, or it does not compile.
        """

        def body(packed_W: Tensor) -> Sequence[Tensor]:
            with HostConstants(self._device), Corrections(self._device, self.device_kind):
                return step(packed_W)

        self._is_tracing = True
        try:
            with room() if self.device_kind == "cpu" else nullcontext():
                return capture(body, words, list(self._buffers.values()), self.device_kind)
        finally:
            self._is_tracing = False

    def compile(self, traced: CapturedProgram) -> CapturedProgram:
        """The same: see :meth:`trace`."""
        return traced

    @torch.inference_mode(False)
    @torch.no_grad()
    def call(self, executable: CapturedProgram, packed_W: Tensor) -> Started:
        """Start a program.

        Raises:
            ValueError: the input is of another size than the program's.
        """
        if packed_W.numel() != executable.words:
            raise ValueError(f"The program takes {executable.words} words of input, not {packed_W.numel()}.")
        return executable.run(packed_W.to(self._device))

    def to_host(self, results: Started) -> list[Tensor]:
        """Wait, and fetch all of them together."""
        return _fetched(results.results)

    def memory(self) -> ChipMemory | None:
        """As torch_xla says; nothing for the host's processor."""
        if self.device_kind == "cpu":
            return None
        info = xm.get_memory_info(self._device)
        return ChipMemory(total=int(info["bytes_limit"]), held=int(info["bytes_used"]))

    def enable_cache(self, folder: Path) -> None:
        """Keep compiled programs in a folder, of which a process can have one. The host's runtime cannot read what it
        wrote, so that its programs are not kept.
        """
        if self.device_kind == "cpu" or os.environ.get(CACHE) == str(folder):
            return
        if XLAC._xla_computation_cache_is_initialized():
            where = os.environ.get(CACHE, "memory alone")
            _logger.warning("torch_xla keeps compiled programs in %s, as before, and not in %s", where, folder)
            return
        xr.initialize_cache(str(folder))


def _fetched(tensors: Sequence[Tensor]) -> list[Tensor]:
    fetched: list[Tensor] = XLAC._xla_get_cpu_tensors(list(tensors))
    return fetched


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
