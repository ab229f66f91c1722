"""Which way to take a product of wide rows and a weight of 8 or 4 bits, by its shape alone."""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor

from dovetail_cuda.kernels.narrow import Codes
from dovetail_cuda.kernels.prompt_support import has_engine

FEW_TOKENS = 64
"""Up to which a product that streams the weight is the fastest."""
MANY_TOKENS = 512
"""Up to which nothing is widened first; above, always where many rows have no kernel of their own."""
MOST_TOKENS = 2048
"""Above which a weight is always widened first, and left to cuBLAS."""
_ALIGNED = 16
"""Bytes that the copy engine wants between rows."""


class Way(IntEnum):
    """How a product is taken; those of many rows have the rows of their tiles as their value."""

    STREAM = 0
    WIDEN_FIRST = 1
    ROWS_128 = 128
    ROWS_256 = 256


def way(x_TI: Tensor, codes: Codes, processors: int) -> Way:
    """The fastest by what an H100 took.

    Args:
        x_TI: float16 or bfloat16.
        processors: of the device.
    """
    tokens = len(x_TI)
    if tokens <= FEW_TOKENS:
        return Way.STREAM
    if tokens > MOST_TOKENS:
        return Way.WIDEN_FIRST
    if not _takes_many_rows(x_TI, codes):
        return Way.WIDEN_FIRST if tokens > MANY_TOKENS else Way.STREAM
    return _cheapest(tokens, codes.shape[0], codes.weight.dtype == torch.uint8, processors)


@lru_cache
def _cheapest(tokens: int, outputs: int, pairs: bool, processors: int) -> Way:
    other = Way.WIDEN_FIRST if tokens > MANY_TOKENS else Way.STREAM
    return min(other, Way.ROWS_128, Way.ROWS_256, key=lambda way: _cost(way, tokens, outputs, pairs, processors))


def _cost(way: Way, tokens: int, outputs: int, pairs: bool, processors: int) -> float:
    """Microseconds per 4096 inputs."""
    if way == Way.WIDEN_FIRST:
        return outputs / 4096 * ((17 if pairs else 19) + 47 * tokens / 1024)
    if way == Way.STREAM:
        tiles = _parts(outputs, 64) * _parts(tokens, 128)
        if tiles <= processors:
            return 21 if 2 * tiles <= processors else 30
        return 40 * _parts(tiles, 2 * processors)
    tiles = _parts(outputs, 128) * _parts(tokens, way)
    each = {Way.ROWS_128: (39, 50), Way.ROWS_256: (53, 64)}[way]
    return each[pairs] * _parts(tiles, processors)


def _parts(whole: int, part: int) -> int:
    return -(-whole // part)


def _takes_many_rows(x_TI: Tensor, codes: Codes) -> bool:
    """Whether :mod:`dovetail_cuda.kernels.many_rows` computes this."""
    strides = x_TI.stride(0) * x_TI.element_size(), codes.weight.stride(0), x_TI.data_ptr(), codes.weight.data_ptr()
    return (
        has_engine(x_TI.device)
        and x_TI.dtype != torch.float32
        and x_TI.stride(1) == 1
        and all(number % _ALIGNED == 0 for number in strides)
        and (codes.group_size >= codes.shape[1] or codes.group_size % 64 == 0)
    )
