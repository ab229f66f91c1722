"""Zeroed memory straight from the operating system, in huge pages where it grants them.

Weights are read once per step from end to end; with small pages the translation misses and the prefetchers, which stop
at page ends, cost a good part of the memory bandwidth.
"""

from __future__ import annotations

import mmap
import weakref
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
ARENA_BYTES = 32 << 20
ALIGNMENT = 64
SMALL = 1 << 20
"""Bytes below which the C library's memory is as good."""


def _map(num_bytes: int) -> mmap.mmap:
    """At least ``num_bytes`` from a huge page's beginning on."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    mapping = mmap.mmap(-1, num_bytes + HUGE_PAGE, **private)
    if hasattr(mmap, "MADV_HUGEPAGE") and num_bytes >= HUGE_PAGE:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def zeroed(num_bytes: int) -> Tensor:
    """uint8 ``[num_bytes]`` of zeros, aligned to a huge page. Memory is taken when it is first touched."""
    whole = torch.frombuffer(_map(num_bytes), dtype=torch.uint8)
    first = -whole.data_ptr() % HUGE_PAGE
    return whole[first : first + num_bytes]


class Arena:
    """Many tensors that live equally long, side by side in huge pages. Memory is freed with the last of them."""

    def __init__(self) -> None:
        self._chunk: Tensor | None = None
        self._used = 0

    def take(self, num_bytes: int) -> Tensor:
        """uint8 ``[num_bytes]``, aligned to a cache line."""
        if self._chunk is None or self._used + num_bytes > len(self._chunk):
            self._chunk = zeroed(max(num_bytes, ARENA_BYTES))
            self._used = 0
        taken = self._chunk[self._used : self._used + num_bytes]
        self._used += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return taken


class Scratch:
    """Memory for large results, used again as soon as no tensor shows it any more.

    The C library gives large blocks back to the operating system when they are freed; a step that computes many tokens
    would take and clear the same pages anew for every layer.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[mmap.mmap]] = defaultdict(list)
        self._leases: dict[int, weakref.ref[memoryview]] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        count = 1
        for size in shape:
            count *= size
        num_bytes = count * dtype.itemsize
        if num_bytes < SMALL:
            return torch.empty(shape, dtype=dtype)
        room = _room(num_bytes)
        free = self._free[room]
        mapping = free.pop() if free else _map(room)
        # Torch keeps the view as long as any tensor uses the memory, and its end returns the mapping.
        lease = memoryview(mapping)
        key = id(lease)

        def give_back(_: weakref.ref[memoryview]) -> None:
            del self._leases[key]
            free.append(mapping)

        self._leases[key] = weakref.ref(lease, give_back)
        return torch.frombuffer(lease, dtype=dtype, count=count).view(shape)


def _room(num_bytes: int) -> int:
    """Sizes that differ a little share mappings: the next of 4, 5, 6, 7, 8, 10, 12 … times a power of two."""
    step = 1 << (num_bytes.bit_length() - 3)
    return -(-num_bytes // step) * step
