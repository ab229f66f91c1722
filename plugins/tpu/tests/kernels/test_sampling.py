"""From logits to tokens, against the core's operations and a sort in float64."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dovetail.ops import random, reference
from dovetail.ops.sampling import SamplingTensors
from dovetail_tpu.kernels import sampling

SIZES = (1, 129, 5000)
SETTINGS = {
    "no filters": {},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.6},
    "min-p": {"min_p": 0.1},
    "all three": {"top_k": 40, "top_p": 0.9, "min_p": 0.02},
    "wide top-k and top-p": {"top_k": 2000, "top_p": 0.5},
    "top-p of almost all": {"top_p": 0.99},
    "top-p of nothing": {"top_p": 0.0},
}
choose, keep, best = map(jax.jit, (sampling.sample, sampling.filter_logits, sampling.greedy))
recover = jax.jit(sampling.sample_residual)


def parameters(temperatures, top_k=0, top_p=1.0, min_p=0.0) -> SamplingTensors:
    """Of rows, each with its own seed and position."""
    temperatures = torch.tensor(temperatures, dtype=torch.float32)
    rows = len(temperatures)
    greedy = not bool(temperatures.any())
    return SamplingTensors(
        temperature_S=temperatures,
        top_k_S=torch.as_tensor(top_k).expand(rows),
        top_p_S=torch.as_tensor(top_p, dtype=torch.float32).expand(rows),
        min_p_S=torch.as_tensor(min_p, dtype=torch.float32).expand(rows),
        seeds_S=torch.arange(rows) * 7919 - 5,
        positions_S=torch.arange(rows) % 11,
        all_greedy=greedy,
        any_filter=not greedy,
    )


def words(params: SamplingTensors, stream=random.Stream.SAMPLE) -> np.ndarray:
    return random.row_keys(params.seeds_S, params.positions_S, stream).numpy().view(np.int32).reshape(-1, 2)


def ours(params: SamplingTensors) -> sampling.Parameters:
    floats = (x.numpy() for x in (params.temperature_S, params.top_p_S, params.min_p_S))
    temperature_S, top_p_S, min_p_S = floats
    return sampling.Parameters(temperature_S, params.top_k_S.numpy().astype(np.int32), top_p_S, min_p_S, words(params))


def logits_of(rows, size, spread=3.0):
    return spread * torch.randn(rows, size, generator=torch.Generator().manual_seed(rows + size))


def kept_by_sorting(logits_V, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """Which tokens of a row are kept, in float64."""
    x_V = (logits_V / np.float32(temperature)).astype(np.float64)
    order = np.argsort(-x_V, kind="stable")
    probs = np.exp(x_V[order] - x_V.max())
    floor = x_V.max() + math.log(min_p) if min_p else -np.inf
    if 0 < top_k < len(order):
        floor = max(floor, x_V[order[top_k - 1]])
    probs[x_V[order] < floor] = 0
    reached = np.searchsorted(np.cumsum(probs), top_p * probs.sum())
    return x_V >= (max(floor, x_V[order[min(reached, len(order) - 1)]]) if top_p < 1 else floor)


@pytest.mark.parametrize("filters", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("size", SIZES)
def test_filters_are_the_cores(size, filters):
    params = parameters([0.0, 0.5, 1.0, 1.7], **filters)
    for spread in (3.0, 0.1):
        logits_SV = logits_of(4, size, spread)
        expected_SV = reference.filter_logits(logits_SV, params).numpy()
        found_SV = np.asarray(keep(logits_SV.numpy(), ours(params)))
        np.testing.assert_array_equal(np.isneginf(found_SV), np.isneginf(expected_SV))
        np.testing.assert_allclose(found_SV, expected_SV, rtol=1e-6)


@pytest.mark.parametrize("filters", SETTINGS.values(), ids=SETTINGS)
def test_filters_are_those_of_a_sort_in_float64(filters):
    temperatures = [0.5, 0.8, 1.0, 1.3, 2.0, 0.05]
    logits_SV = logits_of(6, 1030).numpy()
    found_SV = np.asarray(keep(logits_SV, ours(parameters(temperatures, **filters))))
    for logits_V, found_V, temperature in zip(logits_SV, found_SV, temperatures, strict=True):
        np.testing.assert_array_equal(~np.isneginf(found_V), kept_by_sorting(logits_V, temperature, **filters))


def test_tokens_tied_with_the_last_one_kept_are_kept():
    logits_SV = np.tile(np.float32([0, 2, 1, 2, 1, 1, 0, -5]), (4, 1))
    params = parameters([1.0] * 4, torch.tensor([1, 3, 0, 0]), torch.tensor([1.0, 1.0, 0.01, 0.75]))
    kept_SV = ~np.isneginf(np.asarray(keep(logits_SV, ours(params))))
    assert kept_SV.sum(1).tolist() == [2, 5, 2, 5]


def mixture(rows):
    """Rows of every kind."""
    generator = torch.Generator().manual_seed(1)
    choice = lambda *values: torch.tensor(values)[torch.randint(len(values), (rows,), generator=generator)]  # noqa: E731
    return parameters(
        choice(0.0, 0.5, 1.0, 1.7).tolist(), choice(0, 1, 20, 3000), choice(1.0, 0.9, 0.3), choice(0.0, 0.0, 0.05)
    )


@pytest.mark.parametrize(("size", "dtype"), [(1, "float32"), (129, "bfloat16"), (5000, "float32")])
def test_tokens_are_the_cores(size, dtype):
    """With the core's noise."""
    logits_SV, params = logits_of(64, size).to(getattr(torch, dtype)), mixture(64)
    found_S = choose(jnp.asarray(logits_SV.float().numpy(), dtype), ours(params))
    assert found_S.tolist() == reference.sample(logits_SV, params).tolist()


def test_rows_do_not_depend_on_others():
    logits_SV, params = logits_of(64, 129), mixture(64)
    together_S = choose(logits_SV.numpy(), ours(params))
    rows = [5, 42, 17]
    alone_S = choose(logits_SV[rows].numpy(), ours(params.rows(torch.tensor(rows))))
    assert alone_S.tolist() == together_S[np.array(rows)].tolist()


def test_greedy_rows_take_the_first_of_the_largest_logits():
    logits_SV = logits_of(40, 1030).round()
    expected_S = np.argmax(logits_SV.numpy(), axis=1)
    np.testing.assert_array_equal(best(logits_SV.numpy()), expected_S)
    np.testing.assert_array_equal(choose(logits_SV.numpy(), ours(parameters([0.0] * 40))), expected_S)


@pytest.mark.parametrize("filters", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_not_finite_is_chosen_and_harms_no_other_row(temperature, filters):
    """Callers tell the request by its token's logit. Of a row with masked tokens, no masked one is chosen."""
    logits_SV = logits_of(7, 300).numpy()
    healthy_S = choose(logits_SV, ours(parameters([temperature] * 7, **filters))).tolist()
    logits_SV[0, 77] = np.nan
    logits_SV[1] = -np.inf
    logits_SV[2, 5] = np.inf
    logits_SV[3] = np.nan
    logits_SV[4, 1:] = -np.inf
    tokens_S = choose(logits_SV, ours(parameters([temperature] * 7, **filters))).tolist()
    assert not np.isfinite(logits_SV[np.arange(4), tokens_S[:4]]).any()
    assert tokens_S[4] == 0
    assert tokens_S[5:] == healthy_S[5:]


@pytest.mark.parametrize("size", [1, 100, 1030])
def test_what_is_left_is_drawn_from_as_by_the_core(size):
    probs_RV, drafts_RV = (logits_of(40, size + i)[:, :size].softmax(-1) for i in (0, 1))
    drafts_RV[::5] = probs_RV[::5]
    drafts_RV[1::5] = 0
    params = parameters([1.0] * 40)
    found_R = recover(probs_RV.numpy(), drafts_RV.numpy(), words(params, random.Stream.RECOVER))
    assert found_R.tolist() == reference.sample_residual(probs_RV, drafts_RV, params).tolist()


@pytest.mark.parametrize("filters", [{}, {"top_k": 12, "top_p": 0.9}], ids=str)
def test_tokens_have_the_distribution_of_what_is_kept(filters):
    rows, size = 20_000, 33
    logits_V = logits_of(1, size, 1.0).numpy()[0]
    kept_V = kept_by_sorting(logits_V, 0.8, **filters)
    expected_V = np.where(kept_V, np.exp(logits_V.astype(np.float64) / 0.8), 0)
    expected_V *= rows / expected_V.sum()
    tokens_S = choose(np.tile(logits_V, (rows, 1)), ours(parameters([0.8] * rows, **filters)))
    counts_V = np.bincount(tokens_S, minlength=size)
    assert not counts_V[~kept_V].any()
    degrees = kept_V.sum() - 1
    statistic = ((counts_V - expected_V)[kept_V] ** 2 / expected_V[kept_V]).sum()
    assert abs(statistic - degrees) < 4 * math.sqrt(2 * degrees)


def test_nothing_is_sorted():
    traced = jax.make_jaxpr(sampling.sample)(logits_of(4, 130).numpy(), ours(parameters([1.0] * 4)))
    assert not re.search(r"\b(sort|top_k)\[", str(traced))


def test_wide_numbers_change_nothing():
    arrays = logits_of(40, 1030).numpy(), ours(parameters([1.0] * 40, top_p=0.7))
    narrow_S = choose(*arrays)
    with jax.enable_x64(True):
        wide_S = choose(*arrays)
    assert wide_S.dtype == np.int32
    assert wide_S.tolist() == narrow_S.tolist()
