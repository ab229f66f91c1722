"""Where :mod:`dovetail_cuda.kernels.expert_stream` can run and gains. Not every release of Triton can import it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dovetail_cuda.kernels.expert_order import SORTED
from dovetail_cuda.kernels.narrow import multiprocessors
from dovetail_cuda.kernels.prompt_support import has_engine

STEP = 128
"""Inputs that are multiplied together."""
CUTS = {8: (16, 3), 20: (32, 2), 32: (64, 2)}
"""Up to so many rows per expert, at an average, tiles of so many rows, and stages. Few experts need a second tile."""
FEWEST = max(stages for _, stages in CUTS.values())
"""Steps of a tile."""
PROGRAMS = 2
"""That a multiprocessor has room for."""
LIKELY = 2
"""Rows per expert, at an average, from which almost every expert has some."""
ALIGNED = 8
"""Elements of 16 bits, of whose multiples the copy engine takes distances between rows."""


class Stream(NamedTuple):
    """How a launch is cut.

    Attributes:
        rows: of a tile.
        stages: steps that are under way together; no tile may have fewer.
        programs: as many as can run together.
        guesses: whether almost every expert has rows, so that programs know their first one.
    """

    rows: int
    stages: int
    programs: int
    guesses: bool


def stream(x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, expert_ids_TA: Tensor) -> Stream | None:
    """How to compute this, if at all: with a few rows per expert, and weights that the copy engine can read."""
    experts, width, inner = down_EDF.shape
    choices = expert_ids_TA.numel()
    cut = next((cut for most, cut in CUTS.items() if choices <= most * experts), None)
    if (
        cut
        and choices <= SORTED
        and has_engine(x_TD.device)
        and x_TD.dtype == gate_up_EFD.dtype == down_EDF.dtype
        and x_TD.dtype in (torch.bfloat16, torch.float16)
        and gate_up_EFD.is_contiguous()
        and down_EDF.is_contiguous()
        and width % ALIGNED == inner % ALIGNED == 0
        and min(width, inner) > (FEWEST - 1) * STEP
    ):
        return Stream(*cut, PROGRAMS * multiprocessors(x_TD.device), choices >= LIKELY * experts)
    return None
