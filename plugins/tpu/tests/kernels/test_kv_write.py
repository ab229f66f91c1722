"""Both ways of storing keys and values, on the host, against a loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from dovetail_tpu.kernels.kv_rows import stored_rows
from dovetail_tpu.kernels.kv_write import cache_shape, kv_scatter, kv_write

PAGE, PLACES, KV_HEADS, SIZE, PADDED = 4, 32, 3, 64, 128
SLOTS = np.array([9, 10, 11, 30, 0, 4, *range(12, 29), 0, 1, 3])
write = functools.partial(kv_write, page=PAGE, interpret=True)


def inputs(kv_dtype, dtype="float32", spread=1.0):
    rng = np.random.default_rng(0)
    k_TNK, v_TNK = (rng.normal(size=(len(SLOTS), KV_HEADS, SIZE)).astype(jnp.dtype(dtype)) * spread for _ in "kv")
    shape = cache_shape(PLACES, KV_HEADS, SIZE, jnp.dtype(kv_dtype).itemsize)
    return jnp.asarray(rng.normal(size=shape) * 3, kv_dtype), k_TNK, v_TNK


def expected_cache(kv_X2NK, k_TNK, v_TNK):
    kv_X2NK = np.array(kv_X2NK)
    k_TNK, v_TNK = (rows_of(x_TNK, kv_X2NK.dtype) for x_TNK in (k_TNK, v_TNK))
    for t, slot in enumerate(SLOTS):
        if slot >= PAGE:
            kv_X2NK[slot] = 0
            kv_X2NK[slot, 0 : 2 * KV_HEADS : 2] = k_TNK[t]
            kv_X2NK[slot, 1 : 2 * KV_HEADS : 2] = v_TNK[t]
    return kv_X2NK


def rows_of(x_TNK, dtype):
    if dtype == np.int8:
        return stored_rows(x_TNK, dtype)
    largest = float(jnp.finfo(dtype).max)
    rows_TNK = np.clip(x_TNK.astype(np.float32), -largest, largest).astype(dtype)
    return np.pad(rows_TNK, ((0, 0), (0, 0), (0, PADDED - SIZE)))


def assert_stored(out_X2NK, expected_X2NK):
    stored, expected = (np.asarray(x_X2NK[PAGE:]).astype(np.float32) for x_X2NK in (out_X2NK, expected_X2NK))
    np.testing.assert_array_equal(stored, expected)


@pytest.mark.parametrize("store", [write, kv_scatter], ids=["kv_write", "kv_scatter"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8"])
def test_stores(store, dtype, kv_dtype):
    kv_X2NK, k_TNK, v_TNK = inputs(kv_dtype, dtype)
    before = np.asarray(kv_X2NK).copy()
    out_X2NK = store(kv_X2NK, k_TNK, v_TNK, SLOTS)
    assert_stored(out_X2NK, expected_cache(before, k_TNK, v_TNK))


@pytest.mark.parametrize("store", [write, kv_scatter], ids=["kv_write", "kv_scatter"])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn"])
def test_cuts_off_at_the_largest(store, kv_dtype):
    kv_X2NK, k_TNK, v_TNK = inputs(kv_dtype, spread=1e5)
    k_TNK[0], v_TNK[0] = np.inf, -np.inf
    out_X2NK = store(kv_X2NK, k_TNK, v_TNK, SLOTS)
    assert_stored(out_X2NK, expected_cache(kv_X2NK, k_TNK, v_TNK))
    assert np.isfinite(np.asarray(out_X2NK).astype(np.float32)).all()


def test_leaves_the_page_of_padding_alone():
    kv_X2NK, k_TNK, v_TNK = inputs("float32")
    np.testing.assert_array_equal(write(kv_X2NK, k_TNK, v_TNK, SLOTS)[:PAGE], kv_X2NK[:PAGE])


@pytest.mark.parametrize("store", [write, kv_scatter], ids=["kv_write", "kv_scatter"])
def test_in_place(store):
    kv_X2NK, k_TNK, v_TNK = inputs("float32")
    memory = jax.jit(store, donate_argnums=0).lower(kv_X2NK, k_TNK, v_TNK, SLOTS).compile().memory_analysis()
    assert memory.alias_size_in_bytes == kv_X2NK.nbytes


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_copies_do_not_race(kv_dtype):
    kv_X2NK, k_TNK, v_TNK = inputs(kv_dtype)
    simulated = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")
    out_X2NK = kv_write(kv_X2NK, k_TNK, v_TNK, SLOTS, page=PAGE, interpret=simulated)
    assert_stored(out_X2NK, expected_cache(kv_X2NK, k_TNK, v_TNK))
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize(
    ("kv_heads", "size", "itemsize", "shape"),
    [
        (1, 128, 2, (2, 128)),
        (1, 64, 1, (4, 128)),
        (2, 256, 4, (4, 256)),
        (3, 96, 2, (8, 128)),
        (8, 128, 1, (16, 128)),
        (10, 129, 2, (24, 256)),
    ],
)
def test_places_tile(kv_heads, size, itemsize, shape):
    assert cache_shape(5, kv_heads, size, itemsize) == (5, *shape)
