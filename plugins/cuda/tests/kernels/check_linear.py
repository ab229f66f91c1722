"""Products of plain weights against float64, where kernels of our own run, and where they do not."""

import pytest
import torch
import torch.nn.functional as F
from inputs import DTYPES, INTERPRETED, close, randn

from dovetail.ops import reference
from dovetail_cuda.kernels import matvec, skinny_support
from dovetail_cuda.kernels.linear import linear, linear_silu_and_mul

needs_hopper = pytest.mark.skipif(
    INTERPRETED or torch.cuda.get_device_capability() != (9, 0), reason="lacks a Hopper GPU"
)


def arguments(tokens, inputs, outputs, dtype, bias=True):
    x = randn(tokens, inputs + 8, dtype=dtype)[:, 4:-4]
    weight = randn(outputs, inputs, dtype=dtype, seed=1) / inputs**0.5
    return x, weight, randn(outputs, dtype=dtype, seed=2) if bias else None


def expected(x, weight, bias):
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 1), (112, 5), (528, 3), (3072, 2)])
def test_few_tokens(dtype, bias, inputs, outputs):
    for tokens in range(1, matvec.MOST + 1):
        case = arguments(tokens, inputs, outputs, dtype, bias)
        close(matvec.multiply(*case), expected(*case), dtype)
        assert torch.equal(linear(*case), matvec.multiply(*case))


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_tokens_in_every_tiling(dtype):
    case = arguments(3, 328, 7, dtype)
    for rows in (1, 2, 4):
        for block, warps in ((128, 1), (256, 4), (512, 2)):
            close(matvec.multiply(*case, matvec.Tiling(rows, block, warps)), expected(*case), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 1), (320, 67)])
def test_gates(dtype, inputs, outputs):
    for tokens, bias in ((1, True), (3, False), (matvec.MOST + 1, True)):
        case = arguments(tokens, inputs, 2 * outputs, dtype, bias)
        close(linear_silu_and_mul(*case), reference.silu_and_mul(expected(*case)), dtype, 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_products_are_torchs(monkeypatch, dtype):
    monkeypatch.setattr(matvec, "multiply", None)
    for tokens in (0, matvec.MOST + 1):
        case = arguments(tokens, 64, 8, dtype)
        assert torch.equal(linear(*case), F.linear(*case))
    x, weight = randn(1, 64, dtype=dtype), randn(8, 64, dtype=dtype)
    for part in (weight[:, 1:], weight.t().contiguous().t(), weight[:, :8]):  # rows are not whole accesses
        few = x[:, : part.shape[1]]
        assert torch.equal(linear(few, part), F.linear(few, part))


def test_views():
    x, weight = randn(30, 6), randn(9, 48, seed=1)
    case = x.t()[:3, 2:26], weight[2:, 8:32], None
    close(linear(*case), expected(*case), torch.float32)


def test_what_suits_dozens(monkeypatch):
    x, weight = torch.zeros(64, 80, dtype=torch.bfloat16), torch.zeros(96, 80, dtype=torch.bfloat16)
    monkeypatch.setattr(skinny_support, "FEWEST", 64 * 80)
    assert not skinny_support.suits(x, weight)
    monkeypatch.setattr(skinny_support, "has_engine", lambda device: True)
    assert skinny_support.suits(x, weight)
    assert skinny_support.suits(x[:33, :64], weight[16:80, 8:72].expand(2, 64, 64).reshape(128, 64))
    assert not skinny_support.suits(x[:32], weight)
    with monkeypatch.context() as patch:
        patch.setattr(skinny_support, "WIDE", 95)
        assert skinny_support.suits(x[:7], weight)
    many, short, narrow = torch.zeros(65, 80, dtype=torch.bfloat16), weight[:63], torch.zeros(96, 80)
    for case in ((many, weight), (x[:0], weight), (x, short), (x, narrow), (x.float(), narrow), (x.half(), weight)):
        assert not skinny_support.suits(*case)
    for case in ((x[:, 4:-4], weight[:, 8:]), (x[:, :64], weight[:, 4:68]), (x[:, ::2], weight[:, :40])):
        assert not skinny_support.suits(*case)


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(72, 1), (136, 333), (2048, 96), (3000, 8200), (64, 66000), (8200, 99)]
)
@pytest.mark.parametrize("gated", [False, True])
def test_dozens_of_tokens(dtype, bias, inputs, outputs, gated):
    from dovetail_cuda.kernels import skinny

    weight = randn(outputs * (1 + gated), inputs, dtype=dtype, seed=1) / inputs**0.5
    bias_O = randn(len(weight), dtype=dtype, seed=2) if bias else None
    for tokens in (1, 33, 64):
        x = randn(tokens, inputs + 8, dtype=dtype)[:, 8:]
        wanted = expected(x, weight, bias_O)
        out = skinny.multiply(x, weight, bias_O, gated=gated)
        close(out, reference.silu_and_mul(wanted) if gated else wanted, dtype, 1 + gated)
        assert torch.equal(out, skinny.multiply(x, weight, bias_O, gated=gated))


@pytest.mark.skipif(not INTERPRETED, reason="not every release of Triton that GPUs come with can import it")
def test_gates_share_no_tiles():
    from dovetail_cuda.kernels import skinny

    x, weight = torch.zeros(33, 1024, dtype=torch.bfloat16), torch.zeros(256, 1024, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"2 programs.*gates.*splits=1"):
        skinny.multiply(x, weight, None, skinny_support.Tiling(64, 128, 2, splits=2), gated=True)
    for gated, splits in ((True, 1), (False, 2)):
        skinny_support.Tiling(64, 128, 2, splits).check(gated)


@needs_hopper
def test_weights_meet_dozens_of_tokens(monkeypatch):
    x, weight = randn(48, 4096, dtype=torch.bfloat16), randn(4096, 4096, dtype=torch.bfloat16, seed=1) / 64
    for product in (linear, linear_silu_and_mul):
        ours = product(x, weight)
        with monkeypatch.context() as patch:
            patch.setattr(skinny_support, "MOST", 0)
            close(ours, product(x, weight).double(), torch.bfloat16, 2)


@pytest.mark.skipif(INTERPRETED, reason="lacks graphs")
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_chains_in_graphs(tokens):
    width = 4096 if tokens > matvec.MOST else 2048
    weights = [randn(width, width, dtype=torch.bfloat16, seed=i) / width**0.5 for i in range(8)]
    start = randn(tokens, width, dtype=torch.bfloat16)

    def chain(x):
        for weight in weights:
            x = linear(x, weight)
        return x

    chain(start)
    graph, x = torch.cuda.CUDAGraph(), torch.empty_like(start)
    with torch.cuda.graph(graph):
        out = chain(x)
    for seed in range(3):
        x.copy_(randn(tokens, width, dtype=torch.bfloat16, seed=seed + 20))
        graph.replay()
        assert torch.equal(out, chain(x.clone()))
