"""Cutting the prompts of a step into tiles of queries: long ones first, and together what reads the same keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

COLUMNS = 7
NUMBER = 6
"""The column that has the number of tiles."""
KEYS = 64
"""Of a step of the kernel; tiles of as many steps are equally long."""


def prompt_tiles(query_start_R1: Tensor, seq_lens_R: Tensor, tokens: int, queries: int) -> Tensor:
    """int32 ``[tiles, COLUMNS]``; as many tiles as any step of these sizes can need, without waiting for the device.

    A row has the first token; how many queries attend; the first one's position; the request and its length; how many
    tokens are written; and, the same in all, how many tiles write. The others come last. Padding after the last request
    is written, but nothing attends: its rows are before every key.

    Args:
        queries: of a tile, at most.
    """
    requests, device = len(seq_lens_R), seq_lens_R.device
    starts = query_start_R1.long()
    counts = F.pad(starts, (0, 1), value=tokens).diff()
    first_tiles = starts // queries + torch.arange(requests + 1, device=device)
    tile = torch.arange(tokens // queries + requests + 1, device=device)
    request = torch.searchsorted(first_tiles, tile, right=True) - 1
    count, offset = counts[request], (tile - first_tiles[request]) * queries
    left = (count - offset).clamp(0, queries)
    attending = torch.where(request < requests, left, 0)
    length = F.pad(seq_lens_R.long(), (0, 1))[request]
    position = torch.where(attending > 0, length - count + offset, -queries)
    number = (left > 0).sum().expand(len(tile))
    columns = torch.stack([starts[request] + offset, attending, position, request, length, left, number], 1)
    steps = ((position + attending + KEYS - 1) // KEYS).clamp(min=1)
    order = torch.where(left > 0, steps, 0).argsort(descending=True, stable=True)
    return columns[order].int()
