"""Log-probabilities, ranks and most likely tokens, against the core's operation and a sort in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dovetail.ops import reference
from dovetail_tpu.kernels.logprobs import top_logprobs

ROWS = 7
score = jax.jit(top_logprobs, static_argnames="k")


def logits_of(size):
    logits_SV = 3 * np.random.default_rng(size).normal(size=(ROWS, size)).astype(np.float32)
    logits_SV[1] = np.round(logits_SV[1])
    logits_SV[2] = 0
    logits_SV[2, ::2] = -0.0
    logits_SV[3, 20:] = -np.inf
    logits_SV[4] *= 20
    return logits_SV


@pytest.mark.parametrize(
    ("size", "k", "dtype"),
    [(20, 20, "float32"), (129, 0, "float32"), (129, 1, "bfloat16"), (129, 20, "bfloat16"), (5000, 20, "float32")],
)
def test_scores_are_the_cores(size, k, dtype):
    logits_SV = jnp.asarray(logits_of(size), dtype)
    tokens_S = np.arange(ROWS, dtype=np.int32) * 3 % size
    wide_SV = torch.from_numpy(np.array(logits_SV.astype(jnp.float32)))
    expected = reference.top_logprobs(wide_SV.double(), torch.from_numpy(tokens_S).long(), k)
    logprobs_S, ranks_S, ids_SK, top_SK = score(logits_SV, tokens_S, k=k)
    np.testing.assert_array_equal(ranks_S, expected[1].numpy())
    np.testing.assert_array_equal(ids_SK, expected[2].numpy())
    for found, wanted in ((logprobs_S, expected[0]), (top_SK, expected[3])):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-6, atol=1e-5)


def test_scores_are_those_of_a_sort_in_float64():
    logits_SV, tokens_S = logits_of(1030), np.int32([0, 5, 900, 7, 1029, 64, 3])
    logprobs_S, ranks_S, ids_SK, top_SK = score(logits_SV, tokens_S, k=20)
    wide_SV = logits_SV.astype(np.float64)
    exact_SV = wide_SV - np.logaddexp.reduce(wide_SV, axis=1, keepdims=True)
    ids = np.argsort(-wide_SV, axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(ids_SK, ids)
    np.testing.assert_allclose(top_SK, np.take_along_axis(exact_SV, ids, 1), rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(logprobs_S, exact_SV[range(ROWS), tokens_S], rtol=1e-6, atol=1e-5)
    above_SV = wide_SV > wide_SV[range(ROWS), tokens_S][:, None]
    np.testing.assert_array_equal(ranks_S, above_SV.sum(1) + 1)


def test_a_row_of_nan_changes_no_other():
    logits_SV, tokens_S = logits_of(300), np.zeros(ROWS, np.int32)
    healthy = score(logits_SV, tokens_S, k=20)
    logits_SV[5] = np.nan
    others = [0, 1, 2, 3, 4, 6]
    for before, after in zip(healthy, score(logits_SV, tokens_S, k=20), strict=True):
        np.testing.assert_array_equal(np.asarray(before)[others], np.asarray(after)[others])


def test_nothing_is_sorted():
    traced = jax.make_jaxpr(functools.partial(top_logprobs, k=20))(logits_of(300), np.zeros(ROWS, np.int32))
    assert not re.search(r"\b(sort|top_k)\[", str(traced))
