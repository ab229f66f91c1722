"""Thresholds found by bisection, against sorting in float64."""

import jax
import numpy as np
import pytest

from dovetail_tpu.kernels.threshold import kth_largest, last_reaching, number, ordered

LOWEST = -0x7F800000
SIZES = (1, 129, 1030)
kth, reaching = jax.jit(kth_largest), jax.jit(last_reaching)


def rows_of(size):
    """Rows with ties, infinities, tiny numbers, and numbers of all magnitudes."""
    rng = np.random.default_rng(size)
    x_SV = rng.normal(size=(6, size)).astype(np.float32)
    x_SV[1] = np.round(x_SV[1])
    x_SV[2] *= 10.0 ** rng.integers(-44, 38, size)
    x_SV[3, size // 2 :] = -np.inf
    x_SV[4, size // 2] = np.inf
    x_SV[5] = -3.5
    return x_SV


def test_keys_are_in_the_order_of_numbers():
    x = np.concatenate([rows_of(1030).ravel(), np.float32([0.0, -0.0, 1e-45, -1e-45, np.inf, -np.inf])])
    keys = np.asarray(ordered(x))
    np.testing.assert_array_equal(np.unique(x, return_inverse=True)[1], np.unique(keys, return_inverse=True)[1])
    np.testing.assert_array_equal(np.asarray(number(keys)), x)
    assert keys.min() == LOWEST


@pytest.mark.parametrize("size", SIZES)
def test_kth_largest(size):
    x_SV = rows_of(size)
    descending_SV = -np.sort(-x_SV, axis=1)
    for k in {1, size // 2 + 1, size}:
        found_S1 = number(kth(ordered(x_SV), np.full(6, k, np.int32)))
        np.testing.assert_array_equal(np.asarray(found_S1)[:, 0], descending_SV[:, k - 1])


def test_each_row_has_its_own_k():
    x_SV, k_S = rows_of(129), np.int32([1, 129, 5, 130, 2**31 - 1, 77])
    found_S1 = np.asarray(kth(ordered(x_SV), k_S))
    descending_SV = -np.sort(-x_SV, axis=1)
    for row, k in enumerate(k_S):
        assert found_S1[row, 0] == (LOWEST if k > 129 else ordered(descending_SV[row, k - 1]))


@pytest.mark.parametrize("size", SIZES)
def test_last_reaching(size):
    """With whole numbers as weights, whose sums are exact."""
    x_SV, rng = rows_of(size), np.random.default_rng(1)
    weights_SV = rng.integers(0, 9, (6, size)).astype(np.float32)
    for share in (0.01, 0.3, 0.999, 1.0):
        amount_S1 = np.ceil(share * weights_SV.sum(1, keepdims=True)).astype(np.float32)
        found_S1 = np.asarray(number(reaching(ordered(x_SV), weights_SV, amount_S1)))
        for x_V, weights_V, amount, found in zip(x_SV, weights_SV, amount_S1[:, 0], found_S1[:, 0], strict=True):
            good = [v for v in x_V if weights_V[x_V >= v].sum() >= amount]
            assert found == (max(good) if amount else np.inf)


def test_what_is_not_reached_keeps_all():
    found_S1 = reaching(ordered(rows_of(100)), np.ones((6, 100), np.float32), np.full((6, 1), 101, np.float32))
    assert (np.asarray(found_S1) == LOWEST).all()
