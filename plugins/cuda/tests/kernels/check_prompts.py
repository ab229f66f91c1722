"""Prompts: how they are cut, and on a Hopper GPU what the kernel computes from that."""

import pytest
import torch
import torch.nn.functional as F
from check_attention import MIX, PADDING, expected, step
from inputs import DEVICE, INTERPRETED, close

from dovetail_cuda.kernels.prompt_support import takes_prompts
from dovetail_cuda.kernels.prompt_tiles import KEYS, NUMBER, prompt_tiles

LONG = [*MIX, (300, 777), (129, 129), (256, 1000), (17, 33), (1, 2000), (1, 128), (32, 128), (6, 6)]
UNUSED = 40
"""Requests that a bucket has room for."""
needs_hopper = pytest.mark.skipif(
    INTERPRETED or torch.cuda.get_device_capability() != (9, 0), reason="lacks a Hopper GPU"
)


def tables(requests):
    starts = torch.tensor([0, *(count for count, _ in requests)]).cumsum(0).int()
    return starts.to(DEVICE), torch.tensor([length for _, length in requests]).int().to(DEVICE)


@pytest.mark.parametrize("unused", [0, UNUSED])
@pytest.mark.parametrize("queries", [4, 32])
def test_tiles(queries, unused):
    starts, lengths = tables(LONG + [(0, 0)] * unused)
    tokens = int(starts[-1]) + PADDING
    tiles = prompt_tiles(starts, lengths, tokens, queries)
    number = int(tiles[0, NUMBER])
    attending, written = [], []
    for first, seeing, position, request, length, rows, _ in tiles.tolist():
        written += range(first, first + rows)
        attending += range(first, first + seeing)
        if seeing:
            count, start = LONG[request][0], int(starts[request])
            assert seeing == rows == min(queries, start + count - first)
            assert length == LONG[request][1]
            assert position == length - count + first - start
        else:
            assert position + queries <= 0
    assert sorted(attending) == list(range(tokens - PADDING))
    assert sorted(written) == list(range(tokens))
    assert (tiles[:, NUMBER] == number).all()
    assert [row[5] > 0 for row in tiles.tolist()] == [i < number for i in range(len(tiles))]
    steps = [max(1, -(-(row[1] + row[2]) // KEYS)) for row in tiles[:number].tolist()]
    assert steps == sorted(steps, reverse=True)


def test_support():
    q, cache = torch.zeros(4, 8, 128, dtype=torch.bfloat16), torch.zeros(3, 2, 16, 128, dtype=torch.bfloat16)
    assert not takes_prompts(q, cache, 0.1)


CASES = [
    (torch.bfloat16, (8, 2), 128, 16),
    (torch.float16, (4, 2), 128, 16),
    (torch.bfloat16, (8, 1), 64, 32),
    (torch.bfloat16, (2, 2), 128, 8),
    (torch.float16, (8, 2), 128, 64),
]


@needs_hopper
@pytest.mark.parametrize(("dtype", "heads", "size", "page"), CASES, ids=str)
def test_prompts(dtype, heads, size, page):
    from dovetail_cuda.kernels.prompts import ROWS, attend_prompts

    q, keys, values, *tables = step(LONG, heads=heads, size=size, page=page, dtype=dtype)
    pages = [x.transpose(1, 2).contiguous() for x in (keys, values)]
    assert takes_prompts(q, pages[0], size**-0.5)
    real = int(tables[1][-1])
    q[real:] = torch.nan
    starts, lengths = F.pad(tables[1], (0, UNUSED), value=real), F.pad(tables[2], (0, UNUSED))
    tiles = prompt_tiles(starts, lengths, len(q), ROWS // (heads[0] // heads[1]))
    out = attend_prompts(q, *pages, tables[0], tiles, size**-0.5, 132)
    close(out[:real], expected([q, keys, values, *tables], size**-0.5)[:real], dtype)
    assert not out[real:].any()


@needs_hopper
def test_many_tiles():
    from dovetail_cuda.kernels.prompts import ROWS, attend_prompts

    q, keys, values, *tables = step([(300, 300)] * 9, heads=(8, 8), size=128, dtype=torch.bfloat16)
    pages = [x.transpose(1, 2).contiguous() for x in (keys, values)]
    tiles = prompt_tiles(*tables[1:], len(q), ROWS)
    outs = [attend_prompts(q, *pages, tables[0], tiles, 0.1, programs) for programs in (1, 7, 132)]
    assert all(torch.equal(outs[0], out) for out in outs[1:])
