"""Tiles of ragged segments: requests of a step, or experts' rows."""

from __future__ import annotations

import triton
import triton.language as tl

SEARCHED: tl.constexpr = tl.constexpr(128)
"""Segments that a program looks at together."""


@triton.jit
def segment_of(
    tile: tl.tensor, starts_ptr: tl.tensor, starts_stride: tl.tensor, segments: tl.tensor, ROWS: tl.constexpr
) -> tl.tensor:
    """The segment that a tile of ``ROWS`` rows belongs to.

    Segment ``s`` has the tiles from ``starts[s] // ROWS + s`` on, which leaves room for a rest in each, so the number
    of tiles depends on the numbers of rows and segments alone. A tile may begin beyond its segment's end.
    """
    segment = -1
    for first in range(0, segments, SEARCHED):
        candidates = first + tl.arange(0, SEARCHED)
        exists = candidates < segments
        starts = tl.load(starts_ptr + candidates * starts_stride, mask=exists, other=0)
        segment += tl.sum((exists & (starts // ROWS + candidates <= tile)).to(tl.int32), axis=0)
    return segment
