"""Zeroed memory straight from the operating system, in huge pages where it grants them.

Weights are read once per step from end to end; with small pages the translation misses and the prefetchers, which stop
at page ends, cost a good part of the memory bandwidth.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
ARENA_BYTES = 32 << 20
ALIGNMENT = 64


def zeroed(num_bytes: int) -> Tensor:
    """uint8 ``[num_bytes]`` of zeros, aligned to a huge page. Memory is taken when it is first touched."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    mapping = mmap.mmap(-1, num_bytes + HUGE_PAGE, **private)
    if hasattr(mmap, "MADV_HUGEPAGE") and num_bytes >= HUGE_PAGE:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
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
