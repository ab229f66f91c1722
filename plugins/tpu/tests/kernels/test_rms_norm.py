"""The fused norm, on the host, against numpy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_tpu.kernels.chip import CHIPS, V4, V5E
from dovetail_tpu.kernels.rms_norm import NAMED_SHARE, _row_bytes, _rows, reads_once, rms_norm

EPS = 1e-5


def norm_of(x_TD, weight_D):
    x_TD = x_TD.astype(np.float64)
    return x_TD / np.sqrt((x_TD * x_TD).mean(1, keepdims=True) + EPS) * weight_D.astype(np.float64)


@functools.cache
def norm(**options):
    return jax.jit(functools.partial(rms_norm, eps=EPS, chip=V5E, interpret=True, **options))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adds", [False, True], ids=["alone", "add"])
@pytest.mark.parametrize("tokens", [1, 33, 300])
def test_norm(dtype, adds, tokens):
    rng = np.random.default_rng(tokens)
    x_TD, residual_TD = (rng.normal(size=(tokens, 256)).astype(jnp.dtype(dtype)) for _ in "xr")
    x_TD *= np.logspace(-2, 2, tokens)[:, None].astype(x_TD.dtype)
    weight_D = rng.normal(size=256).astype(x_TD.dtype)
    out = norm()(x_TD, weight_D, residual_TD if adds else None)
    total_TD = (x_TD + residual_TD) if adds else x_TD
    assert out.scale_TG is None
    assert (out.sum_TD is not None) == adds
    if adds:
        np.testing.assert_array_equal(np.asarray(out.sum_TD), total_TD)
    tolerance = 1e-2 if dtype == "bfloat16" else 1e-6
    assert out.norm_TD.dtype == x_TD.dtype
    np.testing.assert_allclose(np.asarray(out.norm_TD).astype(np.float64), norm_of(total_TD, weight_D), rtol=tolerance)


@pytest.mark.parametrize("narrow", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("group", [None, 128])
def test_norm_quantized(narrow, group):
    rng = np.random.default_rng(0)
    x_TD, residual_TD = (rng.normal(size=(40, 384)).astype(np.float32) for _ in "xr")
    x_TD[3], residual_TD[3] = 0, 0
    weight_D = rng.normal(size=384).astype(np.float32)
    out = norm(dtype=narrow, group=group)(x_TD, weight_D, residual_TD)
    size, largest = group or 384, 127 if narrow == "int8" else 448
    expected_TD = norm_of(x_TD + residual_TD, weight_D)
    peaks_TG = np.abs(expected_TD.reshape(40, -1, size)).max(2)
    assert out.norm_TD.dtype == jnp.dtype(narrow)
    np.testing.assert_allclose(np.asarray(out.scale_TG), np.maximum(peaks_TG, 1e-12) / largest, rtol=1e-5)
    scale_TD = np.repeat(np.asarray(out.scale_TG), size, axis=1)
    magnitudes = np.maximum(np.abs(expected_TD / scale_TD), 2.0**-6)
    steps = 1.0 if narrow == "int8" else 2.0 ** (np.floor(np.log2(magnitudes)) - 3)
    error = np.abs(np.asarray(out.norm_TD).astype(np.float64) - expected_TD / scale_TD) / steps
    assert error.max() < 0.51
    np.testing.assert_array_equal(np.asarray(out.sum_TD), x_TD + residual_TD)


def test_bad_rows_show_in_their_scales_alone():
    x_TD = np.random.default_rng(1).normal(size=(4, 128)).astype(np.float32)
    good = norm(dtype="int8")(x_TD, np.ones(128, np.float32), np.zeros_like(x_TD))
    x_TD[1, 5], x_TD[2, 9] = np.nan, np.inf
    out = norm(dtype="int8")(x_TD, np.ones(128, np.float32), np.zeros_like(x_TD))
    assert not np.isfinite(np.asarray(out.scale_TG)[1:3]).any()
    for row in (0, 3):
        np.testing.assert_array_equal(out.norm_TD[row], good.norm_TD[row])


def test_is_used_where_rows_leave_vector_memory():
    assert reads_once(V4, 2048, 4096, 2)
    assert not reads_once(V5E, 64, 4096, 2)
    assert not reads_once(V4, 1 << 20, 100, 2)
    assert not reads_once(V4, 1 << 20, 4096, 2, group=96)
    assert not reads_once(None, 1 << 20, 4096, 2)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("width", [128, 4096, 16384, 65536])
def test_blocks_fit_vector_memory(chip, width):
    for itemsize in (2, 4):
        if reads_once(chip, 1 << 20, width, itemsize):
            assert _rows(chip, width, itemsize) * _row_bytes(width, itemsize) <= chip.vmem_bytes * NAMED_SHARE
        else:
            assert width > 4096
