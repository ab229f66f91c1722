"""Noise, and from logits to tokens: each token is the reference's."""

import math

import pytest
import torch
import triton
import triton.language as tl
from inputs import DEVICE, DTYPES, INTERPRETED, randn

from dovetail.ops import reference
from dovetail.ops.random import Stream, row_keys
from dovetail.ops.random import gumbel as torch_gumbel
from dovetail.ops.sampling import ALL_GREEDY, SamplingTensors
from dovetail_cuda.kernels.filtering import filter_logits
from dovetail_cuda.kernels.noise import gumbel, row_key
from dovetail_cuda.kernels.penalties import penalize
from dovetail_cuda.kernels.residual import sample_residual
from dovetail_cuda.kernels.sampling import sample

# the interpreter takes a tenth of a second for a row
SIZES = [1, 7, 5000] if INTERPRETED else [1, 7, 5000, 128256, 151936]
CASES = [(7, "ties"), (5000, "wide"), (5000, "flat")]
if not INTERPRETED:
    CASES += [(128256, "ties"), (128256, "wide"), (151936, "flat")]
NO_FILTERS = [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.3, 0, 1.0, 0.0), (1.7, 0, 1.0, 0.0)]
SETTINGS = [
    *NO_FILTERS,
    (0.0, 3, 0.5, 0.5),
    (1.0, 1, 1.0, 0.0),
    (1.3, 5, 1.0, 0.0),
    (0.7, 50, 0.9, 0.0),
    (1.0, 2000, 0.9, 0.0),
    (1.0, 10**6, 1.0, 0.0),
    (1.0, 0, 1e-6, 0.0),
    (0.8, 0, 0.5, 0.0),
    (1.0, 0, 0.95, 0.0),
    (1.0, 0, 1.0, 1.0),
    (1.0, 0, 1.0, 0.1),
    (1.5, 40, 0.8, 0.02),
    (1.0, 0, 0.6, 1e-4),
]
"""Temperature, top-k, top-p and min-p."""


def parameters(settings, first=0):
    temperature, top_k, top_p, min_p = (torch.tensor(column) for column in zip(*settings, strict=True))
    rows = torch.arange(first, first + len(settings))
    columns = (temperature, top_k, top_p, min_p, rows * 7919 - 5, rows % 11 + 1000)
    names = ("temperature_S", "top_k_S", "top_p_S", "min_p_S", "seeds_S", "positions_S")
    return SamplingTensors(
        **{name: column.to(DEVICE) for name, column in zip(names, columns, strict=True)},
        all_greedy=all(t == 0 for t, *_ in settings),
        any_filter=any(t > 0 and (k > 0 or p < 1 or m > 0) for t, k, p, m in settings),
    )


def agree(logits, settings, first=0):
    params = parameters(settings, first)
    out, expected = sample(logits, params), reference.sample(logits, params)
    assert out.dtype == torch.int64
    wrong = (out != expected).nonzero().flatten().tolist()
    assert not wrong, [(settings[row], int(out[row]), int(expected[row])) for row in wrong]
    return out


@triton.jit
def _noise_kernel(
    seeds_ptr: tl.tensor, positions_ptr: tl.tensor, out_ptr: tl.tensor, STREAM: tl.constexpr, WIDTH: tl.constexpr
) -> None:
    row, column = tl.program_id(0), tl.arange(0, WIDTH)
    key = row_key(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), STREAM)
    tl.store(out_ptr + row * WIDTH + column, gumbel(key, column))


@pytest.mark.parametrize("stream", [Stream.SAMPLE, Stream.RECOVER])
def test_noise(stream):
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)], device=DEVICE)
    positions = torch.tensor([0, 1, 2**20, 3, 7], device=DEVICE)
    out = torch.empty(5, 4096, device=DEVICE)
    _noise_kernel[(5,)](seeds, positions, out, int(stream), 4096)
    expected = torch_gumbel(row_keys(seeds, positions, stream), torch.arange(4096, device=DEVICE))
    if INTERPRETED:
        torch.testing.assert_close(out, expected, rtol=2e-6, atol=2e-6)
    else:
        assert torch.equal(out, expected)


def spread_out(size, spread, dtype):
    logits = randn(len(SETTINGS), size + 3, dtype=dtype, seed=size)[:, :size]  # rows that are not aligned
    return {"wide": 3 * logits, "flat": 0.1 * logits, "ties": logits.round()}[spread]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "spread"), CASES)
def test_tokens(dtype, size, spread):
    agree(spread_out(size, spread, dtype), SETTINGS)


@pytest.mark.parametrize("top_k", [40, 2000])
def test_top_p_of_what_top_k_leaves(top_k):
    agree(0.1 * randn(8, 5000), [(1.0, top_k, 0.3, 0.0)] * 4 + [(1.0, 0, 0.3, 0.9 if top_k == 40 else 0.8)] * 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "spread"), CASES[::2])
def test_filters(dtype, size, spread):
    logits = spread_out(size, spread, dtype)
    for settings in (SETTINGS, NO_FILTERS):
        params = parameters(settings)
        out = filter_logits(logits[: len(settings)], params)
        expected = reference.filter_logits(logits[: len(settings)], params)
        other = (out == -math.inf) != (expected == -math.inf)
        # sums of very many probabilities are rounded, each in its own order
        assert int(other.sum(-1).max()) <= size // 10000
        assert torch.equal(out.masked_fill(other, 0), expected.masked_fill(other, 0))


@pytest.mark.parametrize("size", SIZES)
def test_tokens_without_filters(size):
    logits = randn(4, size)
    agree(logits, NO_FILTERS)
    agree(logits.round(), [(0.0, 0, 1.0, 0.0)] * 4)
    assert torch.equal(sample(logits.t().contiguous().t(), ALL_GREEDY), logits.argmax(-1))
    assert sample(logits[:0], ALL_GREEDY).shape == (0,)


@pytest.mark.parametrize("settings", [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.5, 4, 0.9, 0.1)], ids=str)
def test_what_is_not_finite(settings):
    logits = torch.zeros(6, 5000, device=DEVICE)
    logits[0, :4999] = -math.inf
    logits[1, 1500] = math.inf
    logits[2, 1500], logits[2, 2000] = math.inf, math.nan
    logits[3, 4990] = math.nan
    logits[4, 4500:] = -math.inf
    logits[5] = -math.inf
    out = agree(logits[:5], [settings] * 5)
    assert out[:4].tolist() == [4999, 1500, 2000, 4990]
    assert int(sample(logits, parameters([settings] * 6))[5]) == 0


def test_rows_are_independent():
    logits = randn(len(SETTINGS), 3000)
    together = agree(logits, SETTINGS)
    for row in range(0, len(SETTINGS), 12 if INTERPRETED else 1):
        assert int(sample(logits[row : row + 1], parameters(SETTINGS[row : row + 1], row))) == int(together[row])


@pytest.mark.parametrize("size", [1, 5000])
def test_residual(size):
    probs, drafts = (2 * randn(10, size)).softmax(-1), (2 * randn(10, size, seed=1)).softmax(-1)
    drafts[::5] = probs[::5]
    drafts[1::5] = 0
    probs[2::5, size // 2 + 1 :] = 0
    params = parameters([(1.0, 0, 1.0, 0.0)] * 10)
    assert torch.equal(sample_residual(probs, drafts, params), reference.sample_residual(probs, drafts, params))


@pytest.mark.parametrize("size", [1, 500, 5000])
def test_penalties(size):
    logits = 3 * randn(5, size)
    logits[0, : size // 2] = -math.inf
    counts = (randn(4, size, seed=1) * 3).clamp(min=0).to(torch.int32)
    in_prompt = randn(4, size, seed=2) > 1
    factors = torch.tensor([[1.0, 0.0, 0.0], [1.3, 0.0, 0.0], [0.7, 0.5, -0.2], [1.0, 0.3, 0.1]], device=DEVICE)
    for rows, slots in (([], []), ([4, 0, 2], [2, 1, 3]), ([0, 1], [0, 2])):
        chosen = [torch.tensor(index, dtype=torch.int64, device=DEVICE) for index in (rows, slots)]
        out, expected = logits.clone(), logits.clone()
        penalize(out, *chosen, factors, counts, in_prompt)
        reference.penalize(expected, *chosen, factors, counts, in_prompt)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
