"""Mixtures of experts against the reference in float64."""

import pytest
import torch
from inputs import DTYPES, INTERPRETED, close, randn

from dovetail.ops import reference
from dovetail_cuda.kernels import expert_order, experts, routing
from dovetail_cuda.kernels.experts import Tiling, experts_pack, moe_experts
from dovetail_cuda.kernels.routing import choose_experts


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
@pytest.mark.parametrize(("tokens", "experts", "choices"), [(1, 6, 2), (3, 20, 3), (40, 3, 2), (7, 70, 8)])
def test_experts(dtype, tokens, experts, choices):
    case = arguments(tokens, experts, choices, dtype=dtype)
    close(moe_experts(*case), expected(*case), dtype, 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_everyone_chooses_the_same(dtype):
    x, gate_up, down, ids, weights = arguments(70, 4, 1, width=64, inner=64, dtype=dtype)
    case = (x, gate_up, down, torch.full_like(ids, 2), weights)
    close(moe_experts(*case), expected(*case), dtype, 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens(dtype, monkeypatch):
    """Choices in several chunks; tiles with and without a rest, and rests alone."""
    monkeypatch.setattr(expert_order, "COUNTED", (64, 128))
    monkeypatch.setattr(expert_order, "PROGRAMS", 8)
    monkeypatch.setattr(
        experts, "tilings", lambda rows, x: (Tiling(32, 16, 32, 4, 2, 16), Tiling(32, 32, 16, 4, 2, 16))
    )
    x, gate_up, down, ids, weights = arguments(150, 8, 2, width=40, inner=24, dtype=dtype)
    # rows of each expert: none, 1 to 16, 17 to 32, 33 to 48, and so on
    ids[:, 0] = torch.repeat_interleave(torch.arange(1, 8), torch.tensor([1, 16, 17, 32, 33, 48, 3])).to(ids.device)
    ids[:, 1] = 8
    ids[:49, 1] = 7
    case = (x, gate_up, down, ids, weights)
    close(moe_experts(*case), expected(*case), dtype, 2)


@pytest.mark.parametrize("tokens", [1, 5])
def test_nobody_chooses(tokens):
    x, gate_up, down, ids, weights = arguments(tokens, 4, 2)
    assert not moe_experts(x, gate_up, down, torch.full_like(ids, 4), weights).any()
    assert moe_experts(x[:0], gate_up, down, ids[:0], weights[:0]).shape == (0, 48)


@pytest.mark.parametrize("tokens", [2, 12])
def test_odd_sizes(tokens):
    x, gate_up, down, ids, weights = arguments(tokens, 5, 2, width=27, inner=9)
    out = moe_experts(x, experts_pack(gate_up), experts_pack(down), ids, weights)
    close(out, expected(x, gate_up, down, ids, weights), torch.float32, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "active"), [(1, 128, 8), (41, 5, 3), (9, 33, 2)])
def test_choose(dtype, normalize, tokens, experts, active, monkeypatch):
    monkeypatch.setattr(routing, "MANY", 8)
    logits = (3 * randn(tokens, experts + 3)).to(dtype)[:, 3:]
    ids, weights = choose_experts(logits, active, normalize)
    best, chosen = reference.choose_experts(logits.double(), active, normalize)
    assert torch.equal(logits.gather(1, ids), logits.gather(1, best))
    assert torch.equal(ids.sort(1).values.diff(dim=1).bool().all(), torch.tensor(True, device=ids.device))
    close(weights, chosen, torch.float32)


def test_choose_among_none():
    """Rows of NaN choose nobody."""
    logits = randn(3, 8)
    logits[1] = torch.nan
    ids, weights = choose_experts(logits, 2, True)
    assert ids.tolist()[1] == [8, 8]
    assert weights[1].isnan().all()
    assert weights[[0, 2]].isfinite().all()
    assert choose_experts(logits[:0], 2, True)[0].shape == (0, 2)


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
