"""Where :mod:`dovetail_cuda.kernels.skinny` can run and gains, and how it cuts. Not every release can import it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from dovetail_cuda.kernels.prompt_support import has_engine

MOST = 64
"""Tokens of a product; fewer are filled up."""
DOZENS = 33
"""Tokens from which every large weight gains; with fewer only the widest do, those of output heads."""
FEWEST = 2**24
"""Elements of weights that memory is slow enough for."""
ALIGNED = 16
"""Bytes, of whose multiples the copy engine takes addresses and distances between rows."""
NARROW, WIDE = 8192, 65536
"""Outputs up to which tiles are narrowest, so that there are enough; and above which they are widest."""
PROCESSORS = 132
"""Of the GPUs that this was measured on. So many programs have one to themselves, and its memory."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a launch is cut.

    Attributes:
        half: outputs of half a tile; gates are one half, what they are multiplied with the other.
        block: inputs of a step.
        stages: steps that are under way together.
    """

    half: int
    block: int
    stages: int


def suits(x_TI: Tensor, weight_OI: Tensor) -> bool:
    """Whether there are dozens of tokens, and a large weight that the copy engine can read."""
    return (
        (DOZENS if len(weight_OI) <= WIDE else 1) <= len(x_TI) <= MOST
        and has_engine(x_TI.device)
        and weight_OI.numel() >= FEWEST
        and x_TI.dtype == weight_OI.dtype
        and x_TI.dtype in (torch.bfloat16, torch.float16)
        and all(_is_aligned(matrix) for matrix in (x_TI, weight_OI))
    )


def _is_aligned(matrix: Tensor) -> bool:
    distance = matrix.stride(0) * matrix.element_size()
    return matrix.stride(1) == 1 and distance % ALIGNED == 0 and matrix.data_ptr() % ALIGNED == 0


@cache
def tile(outputs: int) -> Tiling:
    """How to cut a product with so many outputs, those of gates and what they are multiplied with together."""
    if outputs > WIDE:
        return Tiling(half=64, block=128, stages=2)
    if outputs > NARROW:
        return Tiling(half=32, block=128, stages=3)
    return Tiling(half=16, block=128, stages=8 if outputs <= 32 * PROCESSORS else 4)
