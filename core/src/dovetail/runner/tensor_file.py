"""Reading safetensors files without keeping them in memory.

Format: 8 bytes little-endian header length, the JSON header ``{name: {dtype, shape, data_offsets}}``, then the data, to
which the offsets are relative (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dovetail.errors import ModelLoadError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CHUNK_BYTES = 8 << 20
"""Most bytes of a file that are mapped into memory at a time, if a row is no larger."""
MAX_HEADER_BYTES = 100 << 20
"""As in the format's own reader: a longer header is a corrupt one."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file; ``start`` is its byte offset from the beginning of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a tensor, from row ``row`` on; scalars are one piece of shape ``[]``."""

    row: int
    shape: tuple[int, ...]
    start: int
    nbytes: int


class TensorFile:
    """One safetensors file, open for reading.

    Attributes:
        path: of the file.
        tensors: what it holds, in the order of their bytes.
    """

    def __init__(self, path: Path) -> None:
        """Open the file and check its header against its size.

        Raises:
            ModelLoadError: the file is missing, truncated or not of the format.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                # A private mapping: torch warns about read-only memory, and nobody writes.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError:
            raise ModelLoadError(f"{path} is missing. Download the checkpoint again.") from None
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"{path} cannot be read: {error}. Download it again.") from error
        self.tensors = self._read_header()

    def chunks(self, tensor: StoredTensor) -> Iterator[tuple[int, Tensor]]:
        """A tensor in pieces: ``(first row, rows)``. Each piece is gone after its turn."""
        for piece in self.pieces(tensor):
            if not piece.nbytes:
                yield piece.row, torch.empty(piece.shape, dtype=tensor.dtype)
                continue
            count = math.prod(piece.shape)
            mapped = torch.frombuffer(self._map, dtype=tensor.dtype, count=count, offset=piece.start)
            yield piece.row, mapped.view(piece.shape)
            del mapped
            self._release(piece.start, piece.nbytes)

    @staticmethod
    def pieces(tensor: StoredTensor) -> Iterator[Piece]:
        """Where a tensor lies, cut along its first dimension into pieces of about ``CHUNK_BYTES`` at most."""
        row_bytes = tensor.nbytes // tensor.shape[0] if tensor.shape and tensor.nbytes else 0
        if not row_bytes:
            yield Piece(0, tensor.shape, tensor.start, tensor.nbytes)
            return
        step = max(1, CHUNK_BYTES // row_bytes)
        for row in range(0, tensor.shape[0], step):
            count = min(step, tensor.shape[0] - row)
            yield Piece(row, (count, *tensor.shape[1:]), tensor.start + row * row_bytes, count * row_bytes)

    def _release(self, start: int, nbytes: int) -> None:
        """Return the pages of this range to the system; a page shared with a neighbour is read again from the cache."""
        first = start - start % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, first, start + nbytes - first)

    def _read_header(self) -> list[StoredTensor]:
        size = len(self._map)
        header_bytes = int.from_bytes(self._map[:8], "little")
        if size < 8 or header_bytes > min(MAX_HEADER_BYTES, size - 8):
            raise self._corrupt(f"its header of {header_bytes} bytes exceeds the file's {size} bytes")
        try:
            header: dict[str, Any] = json.loads(self._map[8 : 8 + header_bytes])
            header.pop("__metadata__", None)
            tensors = [_stored(name, entry, 8 + header_bytes) for name, entry in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._corrupt(f"its header is unreadable ({type(error).__name__}: {error})") from error
        for tensor in tensors:
            nbytes = math.prod(tensor.shape) * tensor.dtype.itemsize
            if tensor.nbytes != nbytes or tensor.start < 8 + header_bytes or min(tensor.shape, default=0) < 0:
                raise self._corrupt(f"the offsets of {tensor.name} do not fit its shape {list(tensor.shape)}")
            if tensor.start + tensor.nbytes > size:
                raise self._corrupt(f"{tensor.name} should end at byte {tensor.start + tensor.nbytes} of {size}")
        return sorted(tensors, key=lambda tensor: tensor.start)

    def _corrupt(self, why: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path} is truncated or corrupt: {why}. Download it again.")


def _stored(name: str, entry: dict[str, Any], data_start: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} has the unknown dtype {entry['dtype']!r}")
    first, last = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    return StoredTensor(name, DTYPES[entry["dtype"]], shape, data_start + first, last - first)
