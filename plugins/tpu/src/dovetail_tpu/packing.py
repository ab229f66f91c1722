"""Many small tensors of the host as one, so that a step takes one copy to the chip."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jax import Array, lax
from torch import Tensor

from dovetail_tpu.bridges.protocol import Bridge

_LOW = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class Packing:
    """Shapes and dtypes of the tensors, in order. In the packed one, int32 ``[W]``, an int64 takes two elements, of
    which the first is the lower half; every other number takes one.
    """

    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Packing:
        """That of these tensors.

        Raises:
            TypeError: one holds numbers that do not fit.
        """
        dtypes = tuple(tensor.dtype for tensor in tensors)
        if any(dtype.is_complex or dtype is torch.float64 for dtype in dtypes):
            raise TypeError(f"A step's inputs may be integers, and floats of up to 32 bits, not {dtypes}.")
        return cls(tuple(tensor.shape for tensor in tensors), dtypes)

    @property
    def words(self) -> int:
        """Elements of the packed tensor; one at least."""
        return max(1, sum(self._counts()))

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """On the host."""
        words = [_words(tensor) for tensor in tensors if tensor.numel()]
        return torch.from_numpy(np.concatenate(words) if words else np.zeros(1, np.int32))

    def unpack(self, packed_W: Tensor, bridge: Bridge) -> Iterator[Tensor]:
        """In a program."""
        start = 0
        for shape, dtype, count in zip(self.shapes, self.dtypes, self._counts(), strict=True):
            words = packed_W[start : start + count]
            start += count
            if dtype is torch.int64:
                halves_X2 = words.reshape(-1, 2).to(torch.int64)
                words = (halves_X2[:, 1] << 32) | (halves_X2[:, 0] & _LOW)
            elif dtype.is_floating_point:
                (words,) = bridge.apply(_floats, words)
            yield words.reshape(shape).to(dtype)

    def _counts(self) -> list[int]:
        sizes = zip(self.shapes, self.dtypes, strict=True)
        return [math.prod(shape) * (2 if dtype is torch.int64 else 1) for shape, dtype in sizes]


def _words(tensor: Tensor) -> np.ndarray:
    tensor = tensor.contiguous()
    if tensor.dtype.is_floating_point:
        tensor = tensor.float()
    elif tensor.dtype is not torch.int64:
        tensor = tensor.to(torch.int32)
    return tensor.numpy().reshape(-1).view(np.int32)


def _floats(words: Array) -> tuple[Array]:
    return (lax.bitcast_convert_type(words, np.float32),)
