"""Log-probabilities, ranks and the most likely tokens."""

import math

import pytest
import torch
from inputs import DEVICE, DTYPES, INTERPRETED, randn

from dovetail.ops import reference
from dovetail_cuda.kernels.logprobs import MOST, top_logprobs

SIZES = [30, 5000] if INTERPRETED else [1, 30, 5000, 128256, 151936]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("k", [0, 1, 20, MOST + 1])
def test_top_logprobs(dtype, size, k):
    k = min(k, size)
    logits = 3 * randn(6, size + 3, dtype=dtype, seed=size)[:, :size]
    logits[1] = logits[1].round()  # ties
    logits[2] = 0
    logits[3, : size // 2] = -math.inf
    logits[4] *= 20
    tokens = (torch.arange(6, device=DEVICE) * 3 + size // 2) % size
    out, expected = top_logprobs(logits, tokens, k), reference.top_logprobs(logits.double(), tokens, k)
    for column in (0, 3):
        assert out[column].dtype == torch.float32
        torch.testing.assert_close(out[column], expected[column], rtol=2e-6, atol=2e-6)
    for column in (1, 2):
        assert torch.equal(out[column], expected[column])


def test_no_rows():
    logits, tokens = torch.empty(0, 9, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert [tuple(column.shape) for column in top_logprobs(logits, tokens, 4)] == [(0,), (0,), (0, 4), (0, 4)]


def test_rows_are_independent():
    logits = randn(3, 5000)
    tokens = logits.argmin(-1)
    together = top_logprobs(logits, tokens, 5)
    for row in range(3):
        alone = top_logprobs(logits[row : row + 1], tokens[row : row + 1], 5)
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))
