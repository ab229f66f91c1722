"""Products with few tokens against float64: kernels for a few, for some dozens, and which of them runs."""

import pytest
import torch
import torch.nn.functional as F
from inputs import DEVICE, DTYPES, INTERPRETED, close, randn

from dovetail.ops import reference
from dovetail_cuda.kernels import matvec, skinny
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
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 130), (576, 5)])
def test_dozens_of_tokens(dtype, bias, inputs, outputs):
    for tokens in (1, 7, 17, skinny.MOST):
        case = arguments(tokens, inputs, outputs, dtype, bias)
        close(skinny.multiply(*case), expected(*case), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dozens_of_tokens_in_every_tiling(dtype):
    case = arguments(9, 640, 100, dtype)
    for rows in (32, 64):
        for block, splits in ((64, 1), (32, 3), (64, 7), (128, 5)):
            close(skinny.multiply(*case, skinny.Tiling(rows, block, splits)), expected(*case), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 1), (320, 66)])
def test_gates(dtype, inputs, outputs):
    for tokens, bias in ((1, True), (3, False), (7, True), (skinny.MOST + 1, True)):
        case = arguments(tokens, inputs, 2 * outputs, dtype, bias)
        wanted = reference.silu_and_mul(expected(*case))
        close(linear_silu_and_mul(*case), wanted, dtype, 2)
        close(skinny.multiply(*case, gated=True), wanted, dtype)


def test_which_kernel_runs(monkeypatch):
    names = ("matvec", "skinny")
    for module in (matvec, skinny):
        monkeypatch.setattr(module, "multiply", lambda *_, name=module.__name__: name.rsplit(".", 1)[1])

    def chosen(tokens, weight):
        name = linear(torch.zeros(tokens, weight.shape[1], dtype=weight.dtype, device=DEVICE), weight)
        return name if name in names else "torch"

    short, wide = (torch.zeros(8, 64, dtype=dtype, device=DEVICE) for dtype in (torch.bfloat16, torch.float32))
    tokens = (0, 1, matvec.MOST, matvec.MOST + 1, skinny.MOST, skinny.MOST + 1)
    assert [chosen(t, short) for t in tokens] == ["torch", "matvec", "matvec", "skinny", "skinny", "torch"]
    assert [chosen(t, wide) for t in tokens] == ["torch", "matvec", "matvec", "torch", "torch", "torch"]
    for weight in (short[:, 1:], short.t(), short[:, :48], short[:, :4]):  # ends of rows are not read in whole accesses
        assert chosen(9, weight) == "torch"
    assert chosen(1, short[:, :50]) == "matvec"
    for weight in (short[:, 1:], short.t(), short[:, :4], wide[:, 1:]):
        assert chosen(1, weight) == "torch"


def test_views():
    x, weight = randn(30, 6), randn(9, 48, seed=1)
    case = x.t()[:3, 2:26], weight[2:, 8:32], None
    close(linear(*case), expected(*case), torch.float32)


@pytest.mark.skipif(INTERPRETED, reason="lacks graphs")
@pytest.mark.parametrize("tokens", [2, 20])
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
