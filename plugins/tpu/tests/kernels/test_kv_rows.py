"""Keys and values as rows of the cache, against numpy that knows the form of a row."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dovetail_tpu.kernels.kv_rows import read_rows, stored_rows

SIZES = [8, 64, 96, 112, 120, 128, 200, 256]


def drawn(size, dtype="float32"):
    """Heads ``[T, N, K]`` whose values differ by orders of magnitude."""
    rng = np.random.default_rng(size)
    spread = 10.0 ** rng.uniform(-6, 6, size=(40, 3, 1))
    return (rng.normal(size=(40, 3, size)) * spread).astype(jnp.dtype(dtype))


def scales_of(rows_TNK):
    """The lowest bits of the last 16 elements as a number of bfloat16, lowest first."""
    bits_TNB = rows_TNK[..., -16:].astype(np.int64) & 1
    codes_TN = (bits_TNB << np.arange(16)).sum(-1).astype(np.uint16)
    return codes_TN.view(jnp.bfloat16).astype(np.float64)[..., None]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_is_within_half_a_step_and_a_whole_one_where_the_scale_is(size, dtype):
    x_TNK = drawn(size, dtype)
    rows_TNK = np.asarray(stored_rows(x_TNK, jnp.dtype("int8")))
    assert rows_TNK.dtype == np.int8
    assert rows_TNK.shape == (40, 3, -(-size // 128) * 128)
    scale_TN1, x_TNK = scales_of(rows_TNK), x_TNK.astype(np.float64)
    most_TN1 = np.abs(x_TNK).max(-1, keepdims=True)
    assert (scale_TN1 >= most_TN1 / 127 * (1 - 1e-6)).all()
    assert (scale_TN1 <= most_TN1 / 127 * (1 + 2**-7)).all()
    error_TNK = np.abs(rows_TNK[..., :size] * scale_TN1 - x_TNK) / scale_TN1
    whole = rows_TNK.shape[-1] - 16
    assert error_TNK[..., :whole].max() < 0.501
    assert error_TNK.max() < 1.001
    assert np.isin(rows_TNK[..., size:], [0, 1]).all()


@pytest.mark.parametrize("size", SIZES)
def test_int8_is_read_as_it_is_stored(size):
    rows_TNK = np.asarray(stored_rows(drawn(size), jnp.dtype("int8")))
    out_TNK = np.asarray(read_rows(jnp.asarray(rows_TNK)))
    np.testing.assert_array_equal(out_TNK, (rows_TNK * scales_of(rows_TNK)).astype(np.float32))


def test_rows_without_a_scale_of_their_own():
    x_TNK = np.zeros((4, 1, 128), np.float32)
    x_TNK[1, 0, 3], x_TNK[2] = 1e-35, np.inf
    x_TNK[3, 0, :2] = -np.inf, 1.0
    out_TNK = np.asarray(read_rows(stored_rows(x_TNK, jnp.dtype("int8"))))
    largest = float(jnp.finfo(jnp.bfloat16).max)
    assert (out_TNK[:2] == 0).all()
    np.testing.assert_allclose(out_TNK[2], largest, rtol=1 / 64)
    np.testing.assert_allclose(out_TNK[3, 0, 0], -largest, rtol=1 / 64)


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_floats_are_rounded_cut_off_and_padded_by_zeros(size, dtype):
    dtype, x_TNK = jnp.dtype(dtype), drawn(size)
    rows_TNK = np.asarray(stored_rows(x_TNK, dtype).astype(jnp.float32))
    largest = float(jnp.finfo(dtype).max)
    expected = np.asarray(lax.convert_element_type(np.clip(x_TNK, -largest, largest), dtype).astype(jnp.float32))
    np.testing.assert_array_equal(rows_TNK[..., :size], expected)
    assert (rows_TNK[..., size:] == 0).all()
    np.testing.assert_array_equal(read_rows(stored_rows(x_TNK, dtype)), rows_TNK)
