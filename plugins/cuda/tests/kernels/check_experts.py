"""Mixtures of experts against the reference in float64."""

import pytest
import torch
from inputs import DTYPES, INTERPRETED, close, randn

from dovetail.ops import reference
from dovetail_cuda.kernels import expert_order, experts, group_support, routing, stream_support
from dovetail_cuda.kernels.experts import Tiling, experts_pack, moe_experts
from dovetail_cuda.kernels.group_support import takes_groups
from dovetail_cuda.kernels.routing import choose_experts
from dovetail_cuda.kernels.stream_support import Stream, stream


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


@pytest.mark.parametrize(("tokens", "experts", "choices"), [(9, 20, 3), (40, 6, 4), (130, 9, 4)])
def test_sorted_rows(tokens, experts, choices, monkeypatch):
    monkeypatch.setattr(expert_order, "PART", 32)
    x, _, _, ids, _ = arguments(tokens, experts, choices)
    order, rows = expert_order.sort_by_expert(x, ids, experts, 4)
    chosen = order.choices_C[: ((ids >= 0) & (ids < experts)).sum()].long()
    assert torch.equal(rows[: len(chosen)], x[chosen // choices])
    assert torch.equal(ids.flatten()[chosen], ids.flatten()[chosen].sort().values)
    expert, begin, end = order.tiles_3N[:, order.tiles_3N[1] < order.tiles_3N[2]].long()
    assert torch.equal(expert, ids.flatten()[chosen[begin]])
    assert torch.equal(expert, ids.flatten()[chosen[end - 1]])
    assert (end - begin).clamp(max=4).sum() == len(chosen)


@pytest.mark.skipif(INTERPRETED, reason="lacks what streams weights")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "experts", "choices", "width", "inner"),
    [
        (64, 128, 8, 512, 384),
        (5, 128, 8, 640, 512),
        (40, 24, 3, 712, 264),
        (100, 130, 2, 520, 640),
        (250, 64, 4, 512, 520),
        (500, 64, 4, 512, 520),
    ],
)
def test_streams(dtype, tokens, experts, choices, width, inner):
    """Experts of no row, of one, and of several tiles; odd sizes."""
    x, gate_up, down, ids, weights = arguments(tokens, experts, choices, width, inner, dtype)
    if (stream(x, gate_up, down, ids) is None) != (dtype is torch.float32):
        pytest.skip("another GPU")
    for chosen in (ids, torch.where(ids < experts // 2, ids, 1)):
        case = (x, gate_up, down, chosen, weights)
        out = moe_experts(*case)
        close(out, expected(*case), dtype, 2)
        assert all(torch.equal(out, moe_experts(*case)) for _ in range(5))


def test_what_streams(monkeypatch):
    x, gate_up, down, ids, _ = arguments(16, 4, 2, 272, 264, torch.bfloat16)
    assert stream(x, gate_up, down, ids) is None or not INTERPRETED
    monkeypatch.setattr(stream_support, "has_engine", lambda device: True)
    monkeypatch.setattr(stream_support, "multiprocessors", lambda device: 100)
    assert stream(x, gate_up, down, ids[:3]) == Stream(rows=16, stages=3, programs=200, guesses=False)
    many = ids.repeat(5, 1)
    assert [stream(x, gate_up, down, many[:n]).rows for n in (4, 16, 17, 40, 41, 64)] == [16, 16, 32, 32, 64, 64]
    assert stream(x, gate_up, down, many[:4]).guesses
    assert not stream(x, gate_up, down, many[:65])
    for case in (
        (x.float(), gate_up.float(), down.float()),
        (x, gate_up.half(), down),
        (x, gate_up, down.transpose(1, 2).contiguous().transpose(1, 2)),
        (x, gate_up[..., :256].contiguous(), down[:, :256].contiguous()),
        (x, gate_up[..., :268].contiguous(), down[:, :268].contiguous()),
    ):
        assert not stream(*case, ids)


@pytest.mark.skipif(INTERPRETED, reason="lacks what computes groups of rows")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "experts", "choices", "width", "inner"),
    [(700, 8, 3, 256, 256), (333, 130, 30, 512, 320), (3001, 4, 2, 768, 448), (9000, 128, 8, 256, 256)],
)
def test_groups(dtype, tokens, experts, choices, width, inner, monkeypatch):
    monkeypatch.setattr(group_support, "MANY", 0)
    case = arguments(tokens, experts, choices, width, inner, dtype)
    if not takes_groups(case[2][0], case[2], 128, 64):
        pytest.skip("another GPU")
    for chosen in (case[3], torch.where(case[3] < experts // 2, case[3], 1), torch.full_like(case[3], 1)):
        check_groups(*case[:3], chosen, case[4])


@pytest.mark.skipif(INTERPRETED, reason="lacks what computes groups of rows")
def test_groups_of_all_sizes(monkeypatch):
    """Rows of each expert: none, one, and around parts of tiles, and tiles."""
    monkeypatch.setattr(group_support, "MANY", 0)
    rows = torch.tensor([0, 1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 256, 0, 3, 320, 321, 0])
    x, gate_up, down, ids, weights = arguments(int(rows.sum()), len(rows), 1, 256, 320, torch.bfloat16)
    if not takes_groups(down[0], down, 128, 64):
        pytest.skip("another GPU")
    chosen = torch.repeat_interleave(torch.arange(len(rows)), rows)
    ids[:, 0] = chosen[randn(len(ids)).argsort().cpu()].to(ids.device)
    check_groups(x, gate_up, down, ids, weights)


def check_groups(*case):
    out = moe_experts(*case)
    close(out, expected(*case), out.dtype, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = moe_experts(*case)
    for _ in range(5):
        again.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, again)


def test_what_groups(monkeypatch):
    monkeypatch.setattr(group_support, "MANY", 3)
    x, down = torch.zeros(9, 256, dtype=torch.bfloat16), torch.zeros(3, 512, 256, dtype=torch.bfloat16)
    assert not takes_groups(x, down, 128, 64)
    monkeypatch.setattr(group_support, "has_engine", lambda device: True)
    assert takes_groups(x, down, 128, 64)
    assert not takes_groups(x, down, 64, 0)
    for case in (
        (x[1:], down),
        (x.float(), down.float()),
        (x.half(), down),
        (x, down[:, 8:]),
        (x, down[:, 64:].contiguous()),
        (x[:, :192].contiguous(), down[..., :192].contiguous()),
        (torch.zeros(9, 264).bfloat16(), torch.zeros(3, 512, 264).bfloat16()),
        (torch.zeros(9, 512).bfloat16()[:, :256], down),
    ):
        assert not takes_groups(*case, 128, 64)


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
