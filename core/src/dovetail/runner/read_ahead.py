"""Tensors of files on their way to a device: threads read pieces into staging buffers while earlier ones are copied."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dovetail.errors import ModelLoadError
from dovetail.runner.tensor_file import Piece, StoredTensor, TensorFile

THREADS = 8
"""Readers. One alone copies out of the system's cache more slowly than a device takes it."""
STAGING_BYTES = 128 << 20
"""Of all buffers together; two hold a piece each, however large it is."""
MOST_BUFFERS = 2 * THREADS
Staging = Callable[[int], Tensor]
"""See :meth:`dovetail.contracts.platform.Platform.staging`."""


def unpinned(nbytes: int) -> Tensor:
    """Memory like any other."""
    return torch.empty(nbytes, dtype=torch.uint8)


class ReadAhead:
    """Reads tensors in the order in which they will be asked for. Use it as a context manager: it holds files open."""

    def __init__(
        self, tensors: Iterable[tuple[TensorFile, StoredTensor]], device: torch.device, staging: Staging = unpinned
    ) -> None:
        """Start reading."""
        self._device = device
        self._jobs = deque((file.path, piece) for file, tensor in tensors for piece in file.pieces(tensor))
        largest = max((piece.nbytes for _, piece in self._jobs), default=0)
        count = max(2, min(MOST_BUFFERS, STAGING_BYTES // max(1, largest)))
        buffers = [_Buffer(staging(largest), device) for _ in range(min(count, len(self._jobs)))]
        self._pool = ThreadPoolExecutor(THREADS, "read-ahead")
        self._files: dict[Path, int] = {}
        self._reads: deque[tuple[_Buffer, Future[None]]] = deque()
        for buffer in buffers:
            self._start(buffer)

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        for file in self._files.values():
            os.close(file)

    def chunks(self, file: TensorFile, tensor: StoredTensor) -> Iterator[tuple[int, Tensor]]:
        """As :meth:`TensorFile.chunks`, on the device; tensors must be asked for in order, and read to their end.

        Raises:
            ModelLoadError: the file cannot be read.
        """
        for piece in file.pieces(tensor):
            buffer, read = self._reads.popleft()
            try:
                read.result()
            except OSError as error:
                raise ModelLoadError(f"{file.path} cannot be read: {error}. Download it again.") from error
            staged = buffer.bytes[: piece.nbytes].view(tensor.dtype).view(piece.shape)
            copied = staged.to(self._device, non_blocking=buffer.copied is not None, copy=True)
            if buffer.copied is not None:
                buffer.copied.record()
            self._start(buffer)
            yield piece.row, copied

    def _start(self, buffer: _Buffer) -> None:
        """Fill a buffer with the next piece, as soon as its last one is copied."""
        if not self._jobs:
            return
        path, piece = self._jobs.popleft()
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        self._reads.append((buffer, self._pool.submit(buffer.read, self._files[path], piece)))


class _Buffer:
    """Host memory that a device copies from.

    Attributes:
        bytes: the memory.
        copied: done when the last copy out of it is; None if copies are done when they return.
    """

    def __init__(self, staging: Tensor, device: torch.device) -> None:
        self.bytes = staging
        self.copied = torch.Event(device) if staging.is_pinned() else None
        array: Any = self.bytes.numpy()
        self._view = memoryview(array)

    def read(self, file: int, piece: Piece) -> None:
        """Wait until the memory is free, then read one piece into it."""
        if self.copied is not None:
            self.copied.synchronize()
        done = 0
        while done < piece.nbytes:
            count = os.preadv(file, [self._view[done : piece.nbytes]], piece.start + done)
            if not count:
                raise OSError("it ends too early")
            done += count
