"""Products of plain weights against float64, where a kernel of our own runs, and where it does not."""

import pytest
import torch
import torch.nn.functional as F
from inputs import DTYPES, INTERPRETED, close, randn

from dovetail.ops import reference
from dovetail_cuda.kernels import matvec
from dovetail_cuda.kernels.linear import linear, linear_silu_and_mul


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


@pytest.mark.skipif(INTERPRETED, reason="lacks graphs")
@pytest.mark.parametrize("tokens", [1, 3])
def test_chains_in_graphs(tokens):
    weights = [randn(2048, 2048, dtype=torch.bfloat16, seed=i) / 2048**0.5 for i in range(8)]
    start = randn(tokens, 2048, dtype=torch.bfloat16)

    def chain(x):
        for weight in weights:
            x = linear(x, weight)
        return x

    chain(start)
    graph, x = torch.cuda.CUDAGraph(), torch.empty_like(start)
    with torch.cuda.graph(graph):
        out = chain(x)
    for seed in range(3):
        x.copy_(randn(tokens, 2048, dtype=torch.bfloat16, seed=seed + 20))
        graph.replay()
        assert torch.equal(out, chain(x.clone()))
