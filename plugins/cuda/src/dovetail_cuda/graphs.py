"""Steps as CUDA graphs: captured when a size is met for the second time, replayed from then on.

The first run of a size is an ordinary one: it compiles kernels, and finds out whether the step waits for the device
anywhere, which no graph can hold. So warm-up stays short, and the server is ready before the first capture.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dovetail.contracts.attention import StepTensors
from dovetail.contracts.platform import StepFunction
from dovetail_cuda.tensors import leaves, replaced

_logger = logging.getLogger("dovetail_cuda.graphs")
_WAITS = "synchronizing CUDA operation"
"""What torch says of an operation that waits for the device, while it is told to raise."""


class GraphPool:
    """Memory and stream that all graphs of a platform share: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._handle = torch.cuda.graph_pool_handle()
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._told = False

    def tell(self, error: RuntimeError) -> None:
        """Log once why steps run without a graph, not for each size."""
        if not self._told:
            self._told = True
            _logger.warning("Steps of this model run without a graph, since one of its operations waits: %s", error)

    def capture(self, run: Callable[[], tuple[Tensor, Tensor]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]:
        """Record what ``run`` launches. Nothing of it runs before the graph is replayed."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")
            try:
                outputs = run()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph, outputs


class GraphStep:
    """One bucket's step. Values on the host that the metadata holds are baked into a graph, so each set has its own."""

    def __init__(self, step: StepFunction, pool: GraphPool) -> None:
        self._step = step
        self._pool = pool
        self._met: set[Hashable] = set()
        self._recordings: dict[Hashable, _Recording] = {}
        self._capturable = True

    def __call__(self, step: StepTensors, metadata: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Hidden states and logits, which the next replay of any graph may overwrite."""
        if not self._capturable:
            return self._step(step, metadata)
        key = tuple(leaf for leaf in leaves(metadata) if not isinstance(leaf, Tensor))
        recording = self._recordings.get(key)
        if recording is not None:
            return recording.replay(step, metadata)
        if key not in self._met:
            self._met.add(key)
            return self._first(step, metadata)
        recording = self._recordings[key] = _Recording(self._step, step, metadata, self._pool)
        return recording.replay(step, metadata)

    def _first(self, step: StepTensors, metadata: Sequence[Any]) -> tuple[Tensor, Tensor]:
        try:
            with _refusing_to_wait():
                return self._step(step, metadata)
        except RuntimeError as error:
            if _WAITS not in str(error):
                raise
            self._capturable = False
            self._pool.tell(error)
        return self._step(step, metadata)


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Torch raises where an operation waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls this a prototype; what it misses fails when it is captured
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class _Recording:
    """A graph, and the tensors that it reads and writes."""

    def __init__(self, run: StepFunction, step: StepTensors, metadata: Sequence[Any], pool: GraphPool) -> None:
        inputs: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            inputs.append(tensor.clone(memory_format=torch.contiguous_format))
            return inputs[-1]

        own_step, own_metadata = replaced((step, metadata), keep)
        self._inputs = _by_dtype(inputs)
        self._graph, self._outputs = pool.capture(lambda: run(own_step, own_metadata))

    def replay(self, step: StepTensors, metadata: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Copy the inputs into place, and run."""
        given = _by_dtype([leaf for leaf in leaves((step, metadata)) if isinstance(leaf, Tensor)])
        for own, new in zip(self._inputs, given, strict=True):
            torch._foreach_copy_(own, new)
        self._graph.replay()
        return self._outputs


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Lists that one launch can copy."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())
