"""Where :mod:`dovetail_cuda.kernels.expert_groups` can run and gains. Not every release of Triton can import it."""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail_cuda.kernels.prompt_support import has_engine

ROWS = 64
"""Of a part; tiles have two of them, and up to one more at an expert's end."""
COLUMNS = 256
"""Outputs of a tile."""
DEPTH = 64
"""Inputs of a step: what the copy engine swizzles together."""
MANY = 192
"""Rows per expert, at an average, from which it gains; with fewer, reading weights is what takes time."""
LEAST = 4 * DEPTH
"""Inputs: all steps that are copied ahead belong to a tile and the next."""


def takes_groups(x_CF: Tensor, weight_EDF: Tensor, rows: int, rest: int) -> bool:
    """Whether to compute the outer product there.

    Args:
        rows: of tiles.
        rest: rows that an expert's last tile may have more.
    """
    experts, width, inner = weight_EDF.shape
    return (
        len(x_CF) >= MANY * experts
        and (rows, rest) == (2 * ROWS, ROWS)
        and has_engine(x_CF.device)
        and x_CF.dtype == weight_EDF.dtype
        and x_CF.dtype in (torch.bfloat16, torch.float16)
        and x_CF.is_contiguous()
        and weight_EDF.is_contiguous()
        and width % COLUMNS == inner % DEPTH == 0
        and inner >= LEAST
    )
