"""Sampling as the op table has it: on tensors of the host, and within a program, against the core's operations."""

from __future__ import annotations

import pytest
import torch

from dovetail.contracts.platform import Bucket, PlatformConfig
from dovetail.ops import reference
from dovetail.ops.sampling import ALL_GREEDY, SamplingTensors
from dovetail_tpu import sampling
from dovetail_tpu.platform import TpuPlatform

ROWS, SIZE = 24, 300


@pytest.fixture(params=["on tensors of the host", "in a program"])
def call(request):
    """Calls a function of containers of tensors."""
    platform = TpuPlatform(PlatformConfig())
    if request.param == "in a program":
        return lambda function, *given: platform.compile(function, Bucket(16, 16))(*given)
    return lambda function, *given: function(*given)


def logits_of(seed=0):
    return 3 * torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(seed))


def parameters():
    """Rows of every kind."""
    rows = torch.arange(ROWS)
    return SamplingTensors(
        temperature_S=torch.tensor([0.0, 0.5, 1.0, 1.7]).repeat(ROWS // 4),
        top_k_S=torch.tensor([0, 0, 7]).repeat(ROWS // 3),
        top_p_S=torch.tensor([1.0, 1.0, 1.0, 0.7, 0.9]).repeat(5)[:ROWS],
        min_p_S=torch.tensor([0.0, 0.0, 0.0, 0.05, 0.0, 0.0]).repeat(ROWS // 6),
        seeds_S=(rows - 12) * 0x0123456789ABCDE,
        positions_S=rows * 3,
        all_greedy=False,
        any_filter=True,
    )


def assert_same(found, expected):
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_sample(call):
    logits_SV = logits_of().to(torch.bfloat16)
    assert_same(call(sampling.sample, logits_SV, parameters()), reference.sample(logits_SV, parameters()))


def test_sample_where_all_are_greedy(call):
    logits_SV = logits_of()
    assert_same(call(lambda logits_SV: sampling.sample(logits_SV, ALL_GREEDY), logits_SV), logits_SV.argmax(1))


def test_filter_logits(call):
    found_SV = call(sampling.filter_logits, logits_of(), parameters())
    assert_same(found_SV, reference.filter_logits(logits_of(), parameters()))


def test_sample_residual(call):
    probs_RV, drafts_RV = logits_of().softmax(1), logits_of(1).softmax(1)
    expected_R = reference.sample_residual(probs_RV, drafts_RV, parameters())
    assert_same(call(sampling.sample_residual, probs_RV, drafts_RV, parameters()), expected_R)


def test_top_logprobs(call):
    tokens_S = torch.arange(ROWS) * 5
    found = call(lambda *given: sampling.top_logprobs(*given, 5), logits_of(), tokens_S)
    for column, expected in zip(found, reference.top_logprobs(logits_of(), tokens_S, 5), strict=True):
        assert_same(column, expected)
