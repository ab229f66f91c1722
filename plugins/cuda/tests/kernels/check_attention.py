"""Paged attention, however it is cut, against the reference in float64."""

from itertools import accumulate

import pytest
import torch
from inputs import DEVICE, DTYPES, INTERPRETED, close, randn

from dovetail.ops import reference
from dovetail_cuda.kernels.attention import Tiling, attend, paged_attention, tile

MIX = [(35, 35), (1, 100), (5, 40), (0, 0), (1, 1), (9, 50)]
"""Query tokens and length of each request."""
PADDING = 9


def step(requests=MIX, heads=(4, 2), size=64, page=16, dtype=torch.float32, garbage=torch.nan):
    pages = [-(-length // page) for _, length in requests]
    blocks = 1 + torch.randperm(sum(pages), generator=torch.Generator().manual_seed(1)).int()
    table = torch.zeros(len(requests), max(pages) + 2, dtype=torch.int32)
    caches = torch.full((2, sum(pages) + 1, page, heads[1], size), garbage, dtype=dtype)
    firsts = [0, *accumulate(pages)][:-1]
    for row, (first, count, (_, length)) in enumerate(zip(firsts, pages, requests, strict=True)):
        table[row, :count] = blocks[first : first + count]
        at = torch.arange(length)
        caches[:, table[row, at // page].long(), at % page] = randn(2, length, heads[1], size, seed=row).to(dtype).cpu()
    starts = torch.tensor([0, *accumulate(count for count, _ in requests)], dtype=torch.int32)
    q = 2 * randn(int(starts[-1]) + PADDING, heads[0], size, dtype=dtype, seed=99)
    lengths = torch.tensor([length for _, length in requests], dtype=torch.int32)
    return [q, *(x.to(DEVICE) for x in (*caches, table, starts, lengths))]


def expected(arguments, *rest):
    return reference.paged_attention(*(x.double() if x.is_floating_point() else x for x in arguments), *rest)


def agree(out, arguments, *rest, dtype, looser=1.0):
    real = int(arguments[4][-1])
    close(out[:real], expected(arguments, *rest)[:real], dtype, looser)
    assert bool((out[real:] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("rows", [16, 64])
def test_mix(dtype, splits, rows):
    arguments, tiling = step(dtype=dtype), Tiling(rows=rows, keys=32, splits=splits, warps=4, stages=2)
    agree(attend(*arguments, 0.125, None, None, tiling), arguments, 0.125, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "cap"), [(1, None), (17, None), (1000, None), (None, 3.0), (20, 10.0)])
@pytest.mark.parametrize("splits", [1, 2])
def test_window_and_cap(dtype, window, cap, splits):
    arguments, tiling = step(dtype=dtype), Tiling(rows=32, keys=16, splits=splits, warps=4, stages=2)
    out = attend(*arguments, 0.2, window, cap, tiling)
    agree(out, arguments, 0.2, window, cap, dtype=dtype, looser=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1), (24, 1)], ids=str)
def test_groups(dtype, heads):
    arguments = step(MIX[1:5], heads=heads, dtype=dtype)
    agree(paged_attention(*arguments, 0.125), arguments, 0.125, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "page"), [(21, 5), (80, 1), (128, 64), (256, 16)])
def test_sizes(dtype, size, page):
    arguments = step(MIX[1:5], size=size, page=page, dtype=dtype)
    agree(paged_attention(*arguments, size**-0.5), arguments, size**-0.5, dtype=dtype)


def test_many_requests():
    requests = [(r % 3, r % 3 + r % 20) for r in range(140 if INTERPRETED else 700)]
    arguments = step(requests, heads=(2, 2), size=16)
    agree(paged_attention(*arguments, 0.25), arguments, 0.25, dtype=torch.float32)


def test_strided_tables():
    arguments = step()
    wide = [torch.zeros([2 * n for n in x.shape], dtype=x.dtype, device=DEVICE) for x in arguments[3:]]
    views = [x[tuple(slice(None, None, 2) for _ in x.shape)] for x in wide]
    for view, x in zip(views, arguments[3:], strict=True):
        view.copy_(x)
    agree(paged_attention(*arguments[:3], *views, 0.125), arguments, 0.125, dtype=torch.float32)


def test_padding_alone():
    arguments = step([(0, 0), (0, 0)])
    assert not paged_attention(*arguments, 0.125).any()


@pytest.mark.parametrize(("tokens", "requests"), [(1, 1), (1, 64), (64, 64), (320, 64), (2048, 1), (8192, 256)])
def test_tiling_fills_the_chip_and_depends_on_the_bucket_alone(tokens, requests):
    tiling = tile(tokens, requests, 8, 4, 128, 8192, 2, 132)
    programs = 8 * min(tokens, max(requests, -(-tokens // (tiling.rows // 4)))) * tiling.splits
    assert programs >= 132
    assert tiling.splits == 1 or programs <= 2 * 132


@pytest.mark.skipif(INTERPRETED, reason="too many for the interpreter")
def test_long_steps():
    """As many tiles as a GPU has room for twice, at lengths around a step's."""
    arguments = step([(1, 1 + 7 * r) for r in range(64)], heads=(32, 4), size=128, dtype=torch.bfloat16)
    assert tile(64, 64, 4, 8, 128, 512, 2, 132).keys == 128
    agree(paged_attention(*arguments, 0.09), arguments, 0.09, dtype=torch.bfloat16)


@pytest.mark.skipif(INTERPRETED, reason="lacks graphs")
def test_graphs():
    arguments = step(dtype=torch.bfloat16)
    others = step([(30, 36), (6, 97), (5, 41), (0, 0), (2, 2), (8, 51)], dtype=torch.bfloat16)
    paged_attention(*arguments, 0.125)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(*arguments, 0.125)
    for before, after in zip(arguments, others, strict=True):
        before.copy_(after)
    graph.replay()
    agree(out, arguments, 0.125, dtype=torch.bfloat16)
