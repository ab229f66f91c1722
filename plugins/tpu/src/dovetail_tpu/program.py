"""Program: a step that runs as one program of the chip, with one copy there and one back."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from dovetail.contracts.attention import StepTensors
from dovetail.contracts.platform import Bucket, StepFunction
from dovetail.errors import ConfigError, PluginRunError
from dovetail.tensors import leaves, replaced
from dovetail_tpu.attention import Tables
from dovetail_tpu.bridges.protocol import Bridge, Executable, Step
from dovetail_tpu.compile_pool import CompilePool
from dovetail_tpu.faults import compiling, explained
from dovetail_tpu.packing import Packing

_logger = logging.getLogger("dovetail.tpu")


class Programs:
    """All programs of one platform.

    Attributes:
        is_complete: warm-up is over: steps that were met are not compiled for other inputs any more.
        largest_temp: bytes that the largest program takes while it runs, so far as compilers say.
        is_measured: they said it of each.
        compiled: number of programs that were compiled, or found in the cache.
    """

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self.pool = CompilePool()
        self.is_complete = False
        self.largest_temp = 0
        self.is_measured = True
        self._largest_tokens = 0
        self._largest: list[tuple[ref[_Variant], Sequence[Tensor]]] = []
        self.compiled = 0

    def trace(self, step: Step, words: int, what: str) -> Any:
        """See the bridge's, of which one compiles here.

        Args:
            what: it is.

        Raises:
            ConfigError: the chip's memories do not suffice.
        """
        with explained(self.bridge.device_kind, what):
            return self.bridge.trace(step, words)

    def compile(self, traced: Any, what: str) -> Executable:
        """In one of the pool's threads.

        Args:
            what: was traced.

        Raises:
            ConfigError: the chip's memories do not suffice, or it cannot be compiled.
        """
        with compiling(self.bridge.device_kind, what):
            executable: Executable = self.bridge.compile(traced)
        if executable.temp_bytes is None:
            self.is_measured = False
        else:
            self.largest_temp = max(self.largest_temp, executable.temp_bytes)
        self.compiled += 1
        return executable

    def met(self, bucket: Bucket, variant: _Variant, inputs: Sequence[Tensor]) -> None:
        """A step of padding is compiled. Others keep it, if at all: it holds the caches that it changes."""
        if bucket.num_tokens > self._largest_tokens:
            self._largest_tokens = bucket.num_tokens
            self._largest.clear()
        if bucket.num_tokens == self._largest_tokens:
            self._largest.append((ref(variant), inputs))

    def prove(self) -> None:
        """Wait for all that are being compiled. If it is unknown what they take, the largest run once beside what is
        there by now, rather than fail in the middle of serving.

        Raises:
            ConfigError: the chip's memory does not suffice.
        """
        self.pool.wait()
        if not self.is_measured:
            with explained(self.bridge.device_kind, "The largest step"):
                for kept, inputs in self._largest:
                    variant = kept()
                    if variant is not None:
                        variant.run(inputs)
        self._largest.clear()

    def complete(self) -> None:
        """Wait for all that are being compiled. From now on, a step that would be compiled anew is an error."""
        self.pool.wait()
        self.is_complete = True


class Program:
    """A step of one bucket. It may take and return any containers of tensors.

    Host integers of :class:`StepTensors` are hidden from the step, since they change from one to the next; other values
    that are no tensors have programs of their own.
    """

    def __init__(self, step: StepFunction, bucket: Bucket, programs: Programs) -> None:
        self._step = step
        self._bucket = bucket
        self._programs = programs
        self._variants: dict[Hashable, _Variant] = {}
        self._may_compile = programs.is_complete  # first met while serving

    def __call__(self, *given: Any) -> Any:
        """Run the step. One of padding alone is compiled, and gives zeros until it is."""
        _check_attention(given)
        is_padding = any(isinstance(value, StepTensors) and value.max_seq_len == 0 for value in given)
        args = [_timeless(value) for value in given]
        held = list(leaves(args))
        inputs = [leaf for leaf in held if _is_of_host(leaf)]
        packing = Packing.of(inputs)
        key = packing, tuple(id(leaf) if isinstance(leaf, Tensor) else leaf for leaf in held if not _is_of_host(leaf))
        variant = self._variants.get(key)
        if variant is None:
            self._check_compiles(packing)
            variant = self._variants[key] = _Variant(self._step, args, packing, self._programs, self._bucket)
        if is_padding and not self._programs.is_complete:
            self._programs.met(self._bucket, variant, inputs)
            return variant.zeros()
        return variant.run(inputs)

    def _check_compiles(self, packing: Packing) -> None:
        if not self._programs.is_complete:
            return
        if not self._may_compile:
            raise PluginRunError(
                f"A step of {tuple(self._bucket)} would be compiled after warm-up, for inputs of shapes "
                f"{[list(shape) for shape in packing.shapes]}: report it to the authors of dovetail-tpu, or pass "
                "--eager."
            )
        _logger.warning("Compiling a step of %s that warm-up does not meet", tuple(self._bucket))
        self._may_compile = False


class _Variant:
    """A step with inputs of given shapes."""

    def __init__(
        self, step: StepFunction, args: Sequence[Any], packing: Packing, programs: Programs, bucket: Bucket
    ) -> None:
        self._packing = packing
        self._bridge = bridge = programs.bridge
        self._results: Any = None

        def body(packed_W: Tensor) -> list[Tensor]:
            unpacked = packing.unpack(packed_W, bridge)
            outputs = step(*replaced(args, lambda tensor: next(unpacked) if _is_of_host(tensor) else tensor))
            self._results = replaced(outputs, _like)
            return [leaf for leaf in leaves(outputs) if isinstance(leaf, Tensor)]

        what = f"A step of {bucket.num_tokens} tokens × {bucket.num_requests} requests"
        traced = programs.trace(body, packing.words, what)
        self._executable: Future[Executable] = programs.pool.submit(lambda: programs.compile(traced, what))

    def zeros(self) -> Any:
        """Results of the right shapes."""
        return replaced(self._results, lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype))

    def run(self, inputs: Sequence[Tensor]) -> Any:
        """Results, on the host."""
        started = self._bridge.call(self._executable.result(), self._packing.pack(inputs))
        fetched = iter(self._bridge.to_host(started))
        return replaced(self._results, lambda _: next(fetched))


def _check_attention(given: Sequence[Any]) -> None:
    """Other backends' caches are tensors of the host, which a program would not change."""
    if len(given) > 1 and isinstance(given[0], StepTensors):
        others = {type(metadata).__name__ for metadata in given[1] if not isinstance(metadata, Tables)}
        if others:
            raise ConfigError(
                "Programs of the platform 'tpu' attend by its own backends alone: choose --attention tpu or "
                f"tpu-gather, or --eager. (This one's metadata is of {', '.join(sorted(others))}.)"
            )


def _is_of_host(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type == "cpu"


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _timeless(value: Any) -> Any:
    return replace(value, max_query_len=0, max_seq_len=0) if isinstance(value, StepTensors) else value
