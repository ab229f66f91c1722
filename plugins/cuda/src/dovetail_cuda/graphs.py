"""Steps as CUDA graphs: captured when a size is met for the second time, replayed from then on.

The first run of a size is an ordinary one: it compiles kernels, and finds out whether the step waits for the device
anywhere, which no graph can hold. So warm-up stays short, and the server is ready before the first capture.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from dovetail.contracts.attention import StepTensors
from dovetail.contracts.platform import StepFunction
from dovetail.tensors import leaves, replaced

_logger = logging.getLogger("dovetail_cuda.graphs")
_WAITS = "synchronizing CUDA operation"
"""What torch says of an operation that waits for the device, while it is told to raise."""
_Result = TypeVar("_Result")


class GraphPool:
    """Memory and stream that all graphs of a platform share: only one of them runs at a time.

    No tensor of a graph stays allocated: what it reads, what it needs on the way and what it returns lie where those of
    the graphs before it lie. So all of them together take as much as the largest step.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._handle = torch.cuda.graph_pool_handle()
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._room = 0
        self._told = False
        with torch.cuda.stream(self._stream):
            one = torch.ones(1, 1, device=device)
            torch.mm(one, one)  # what cuBLAS keeps for a stream would else lie in the midst of the graphs' memory

    def set_aside(self, nbytes: int) -> None:
        """What the largest step takes. The first graph that is captured allocates it, in one piece: tensors of steps
        that grow bit by bit would each need a new one.
        """
        self._room = nbytes

    def tell(self, error: RuntimeError) -> None:
        """Log once why steps run without a graph, not for each size."""
        if not self._told:
            self._told = True
            _logger.warning("Steps of this model run without a graph, since one of its operations waits: %s", error)

    def capture(self, run: Callable[[], _Result]) -> tuple[torch.cuda.CUDAGraph, _Result]:
        """Record what ``run`` launches. Nothing of it runs before the graph is replayed."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()  # nothing can be taken back from what others used during a capture
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")
            try:
                if self._room:
                    torch.empty(self._room, dtype=torch.uint8, device=self._device)
                    self._room = 0
                result = run()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph, result


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
    """A graph, and where the tensors lie that it reads and writes."""

    def __init__(self, run: StepFunction, step: StepTensors, metadata: Sequence[Any], pool: GraphPool) -> None:
        def record() -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
            inputs: list[Tensor] = []

            def own(tensor: Tensor) -> Tensor:
                inputs.append(torch.empty_like(tensor, memory_format=torch.contiguous_format))
                return inputs[-1]

            return inputs, run(*replaced((step, metadata), own))

        self._graph, (inputs, outputs) = pool.capture(record)
        self._inputs = _by_dtype([borrowed(tensor) for tensor in inputs])
        self._hidden, self._logits = (borrowed(tensor) for tensor in outputs)

    def replay(self, step: StepTensors, metadata: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Copy the inputs into place, and run."""
        given = _by_dtype([leaf for leaf in leaves((step, metadata)) if isinstance(leaf, Tensor)])
        for own, new in zip(self._inputs, given, strict=True):
            torch._foreach_copy_(own, new)
        self._graph.replay()
        return self._hidden, self._logits


class _Bytes:
    """All bytes of a tensor's storage, as torch takes over what other libraries hold."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.__cuda_array_interface__ = {
            "shape": (storage.nbytes(),),
            "typestr": "|u1",
            "data": (storage.data_ptr(), False),
            "version": 3,
        }


def borrowed(tensor: Tensor) -> Tensor:
    """The same place, without keeping others from being put there."""
    if not tensor.numel():
        return tensor
    storage = tensor.untyped_storage()
    whole = storage.nbytes() // tensor.itemsize * tensor.itemsize
    values = torch.as_tensor(_Bytes(storage), device=tensor.device)[:whole].view(tensor.dtype)
    return values.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Lists that one launch can copy."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())
