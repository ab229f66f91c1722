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
"""Tokens from which every weight but the smallest gains; with fewer only the widest do, those of output heads."""
FEWEST = 2**18
"""Elements of weights that there are enough tiles of."""
ALIGNED = 16
"""Bytes, of whose multiples the copy engine takes addresses and distances between rows."""
WIDE = 65536
"""Outputs from which a weight is an output head."""
LONG = 8192
"""Inputs from which two programs share a tile's."""
MOST_SPLITS, LEAST_INPUTS = 4, 512
"""Programs that share a tile's, where there are too few tiles; and the inputs that each of them should have."""
PROCESSORS = 132
"""Of the GPUs that this was measured on."""
ENOUGH = 92
"""Programs that keep memory busy; tiles are as tall as leaves so many."""
ROOM = 192 * 1024
"""Bytes of shared memory for steps under way on a multiprocessor, where it has two programs for each of them half."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a launch is cut.

    Attributes:
        rows: of the weight, in a tile; for gates half of them, and as many of what they are multiplied with.
        block: inputs of a step.
        stages: steps that are under way together.
        splits: programs that share a tile's inputs.
    """

    rows: int
    block: int
    stages: int
    splits: int = 1

    def check(self, gated: bool) -> None:
        """Whether a product can be cut so.

        Raises:
            ValueError: programs would share a tile of gates, of which only the last one's factors would count.
        """
        if gated and self.splits > 1:
            raise ValueError(f"{self.splits} programs cannot share a tile of gates; give a tiling with splits=1.")


def suits(x_TI: Tensor, weight_OI: Tensor) -> bool:
    """Whether there are dozens of tokens, and a weight that the copy engine can read."""
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
def tile(outputs: int, inputs: int, gated: bool) -> Tiling:
    """How to cut a product with so many outputs, those of gates and what they are multiplied with together."""
    rows = next((rows for rows in (256, 128, 64) if (gated or rows < 256) and -(-outputs // rows) >= ENOUGH), 32)
    splits = 1
    if not gated and rows < 128:
        if inputs >= LONG:
            rows, splits = 2 * rows, 2
        else:
            splits = max(1, min(MOST_SPLITS, PROCESSORS // -(-outputs // rows), inputs // LEAST_INPUTS))
    programs, block = splits * -(-outputs // rows), 128
    room = ROOM if programs <= PROCESSORS else ROOM // 2
    return Tiling(rows, block, max(2, room // (2 * block * (rows + MOST))), splits)
