"""Mixtures of experts against the reference in float64."""

import pytest
import torch
from inputs import DTYPES, INTERPRETED, close, randn

from dovetail.ops import reference
from dovetail_cuda.kernels.experts import moe_experts


def arguments(tokens, experts, choices, width=48, inner=40, dtype=torch.float32):
    x = randn(tokens, width + 5, dtype=dtype)[:, 5:]
    gate_up = randn(experts, 2 * inner, width, dtype=dtype, seed=1) / width**0.5
    down = randn(experts, width, inner, dtype=dtype, seed=2) / inner**0.5
    ids = randn(tokens, experts, seed=3).argsort(1)[:, :choices]
    ids[::5, 0], ids[2::7, -1] = -1, experts
    return x, gate_up, down, ids, randn(tokens, choices, seed=4).abs()


def expected(x, gate_up, down, ids, weights):
    return reference.moe_experts(x.double(), gate_up.double(), down.double(), ids, weights.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "experts", "choices"), [(1, 6, 2), (40, 3, 2), (9, 140, 8)])
def test_experts(dtype, tokens, experts, choices):
    case = arguments(tokens, experts, choices, dtype=dtype)
    close(moe_experts(*case), expected(*case), dtype, 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_everyone_chooses_the_same(dtype):
    x, gate_up, down, ids, weights = arguments(70, 4, 1, width=64, inner=64, dtype=dtype)
    case = (x, gate_up, down, torch.full_like(ids, 2), weights)
    close(moe_experts(*case), expected(*case), dtype, 2)


def test_nobody_chooses():
    x, gate_up, down, ids, weights = arguments(5, 4, 2)
    assert not moe_experts(x, gate_up, down, torch.full_like(ids, 4), weights).any()
    assert moe_experts(x[:0], gate_up, down, ids[:0], weights[:0]).shape == (0, 48)


@pytest.mark.skipif(INTERPRETED, reason="lacks graphs")
def test_graphs():
    case, other = arguments(33, 16, 4), arguments(33, 16, 4)
    moe_experts(*case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe_experts(*case)
    case[3].copy_((other[3] * 7 + 1) % 16)
    graph.replay()
    close(out, expected(*case), torch.float32, 2)
