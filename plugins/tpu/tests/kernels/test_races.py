"""Kernels in a simulator of the chip's memories, which watches who reads and writes what, and when.

Copies are done no sooner than they are awaited, and memory that nobody wrote holds NaN. So a kernel that is wrong about
either shows, although in Pallas' plain interpreter it is right.
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dovetail_tpu import kernels
from dovetail_tpu.kernels.chip import V5E, V5P
from dovetail_tpu.kernels.grouped_matmul import grouped_matmul
from dovetail_tpu.kernels.int4_matmul import int4_matmul
from dovetail_tpu.kernels.quantized_matmul import Weight, quantized_matmul, scales_by_step
from dovetail_tpu.kernels.rms_norm import rms_norm

SIMULATED = pltpu.InterpretParams(
    detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan", num_cores_or_threads=2
)
"""Two cores, as behind a device of v5p: they share what grids declare parallel."""
SIMULATED_IN = {
    "kv_write": "test_kv_write",
    "quantized_matmul": "test_quantized_matmul",
    "ragged_attention": "test_attention",
    "rms_norm": "test_races",
}


def assert_agree(out, expected, tolerance):
    out, largest = np.asarray(out).astype(np.float64), np.abs(expected).max()
    np.testing.assert_allclose(out, expected, rtol=0, atol=tolerance * largest)
    assert not interpret_pallas_call.races.races_found


@pytest.mark.slow
def test_pairs():
    rng, inputs, outputs, group = np.random.default_rng(0), 512, 70, 128
    values_OI = rng.integers(0, 16, (outputs, inputs))
    pairs_OJ = (values_OI[:, ::2] | values_OI[:, 1::2] << 4).astype(np.uint8)
    scale_OG = rng.uniform(0.01, 0.1, (outputs, inputs // group)).astype(np.float32)
    zero_OG = rng.integers(0, 17, scale_OG.shape).astype(np.float32)
    x_TI = rng.normal(size=(5, inputs)).astype(np.float32)
    out_TO = int4_matmul(x_TI, pairs_OJ, scale_OG, zero_OG, group=group, chip=V5E, interpret=SIMULATED)
    zero_OI, scale_OI = (np.repeat(grid_OG.astype(np.float64), group, axis=1) for grid_OG in (zero_OG, scale_OG))
    assert_agree(out_TO, x_TI.astype(np.float64) @ ((values_OI - zero_OI) * scale_OI).T, 5e-6)


@pytest.mark.parametrize(("rows", "outputs"), [(200, 600), pytest.param(200, 70, marks=pytest.mark.slow)])
def test_tiles_of_rows_and_of_outputs(rows, outputs):
    rng, inputs = np.random.default_rng(rows), 256
    codes_OI = rng.integers(-127, 128, (outputs, inputs)).astype(np.int8)
    scale_O1 = rng.uniform(0.01, 0.1, (outputs, 1)).astype(np.float32)
    scale = scales_by_step(jnp.asarray(scale_O1)[None], inputs, inputs)
    weight = Weight(jnp.asarray(codes_OI)[None], scale, None, inputs)
    x_TI = rng.normal(size=(rows, inputs)).astype(np.float32)
    out_TO = quantized_matmul(x_TI, weight, out_dtype=jnp.float32, chip=V5P, interpret=SIMULATED)
    assert_agree(out_TO, x_TI.astype(np.float64) @ (codes_OI * scale_O1.astype(np.float64)).T, 5e-6)


@pytest.mark.slow
def test_rows_of_experts():
    """Of which one has none, one has several tiles, and which leave tiles over."""
    rng, inputs, outputs, experts = np.random.default_rng(1), 256, 40, 3
    starts_E1, rows = np.array([1, 42, 42, 50]), 60
    codes_EOI = rng.integers(-127, 128, (experts, outputs, inputs)).astype(np.int8)
    scale_EOG = rng.uniform(0.01, 0.1, (experts, outputs, 1)).astype(np.float32)
    weight = Weight(jnp.asarray(codes_EOI), scales_by_step(jnp.asarray(scale_EOG), inputs, inputs), None, inputs)
    x_NI = rng.normal(size=(rows, inputs)).astype(np.float32)
    out_NO = grouped_matmul(x_NI, weight, starts_E1, out_dtype=jnp.float32, chip=V5E, interpret=SIMULATED)
    wide_EOI = codes_EOI * scale_EOG.astype(np.float64)
    expected_NO = np.zeros((rows, outputs))
    for e in range(experts):
        own = slice(*starts_E1[e : e + 2])
        expected_NO[own] = x_NI[own] @ wide_EOI[e].T
    assert_agree(out_NO, expected_NO, 5e-6)


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_norms(dtype):
    """With rows of a last block that are none."""
    rng = np.random.default_rng(2)
    x_TD, residual_TD = (rng.normal(size=(300, 256)).astype(np.float32) for _ in "xr")
    weight_D = rng.normal(size=256).astype(np.float32)
    out = rms_norm(x_TD, weight_D, residual_TD, eps=1e-5, dtype=dtype, chip=V5E, interpret=SIMULATED)
    sum_TD = (x_TD + residual_TD).astype(np.float64)
    expected_TD = sum_TD / np.sqrt((sum_TD * sum_TD).mean(1, keepdims=True) + 1e-5) * weight_D
    scale_T1 = 1.0 if dtype is None else np.asarray(out.scale_TG)
    assert_agree(np.asarray(out.norm_TD) * scale_T1, expected_TD, 1e-6 if dtype is None else 1e-2)
    assert_agree(out.sum_TD, sum_TD, 1e-6)


def test_a_copy_that_nobody_awaits_is_seen():
    """So that finding none means something."""

    def kernel(x_ref, out_ref, semaphore):
        copy = pltpu.make_async_copy(x_ref, out_ref, semaphore)
        copy.start()
        out_ref[...] = out_ref[...] + 1
        copy.wait()

    x = jnp.zeros((8, 128), jnp.float32)
    pl.pallas_call(kernel, out_shape=x, scratch_shapes=[pltpu.SemaphoreType.DMA], interpret=SIMULATED)(x)
    assert interpret_pallas_call.races.races_found


def test_every_kernel_is_simulated():
    found = {path.stem for path in Path(kernels.__file__).parent.glob("*.py") if "pallas_call(" in path.read_text()}
    assert found == SIMULATED_IN.keys()
    for name in SIMULATED_IN.values():
        text = Path(__file__).with_stem(name).read_text()
        assert "assert not interpret_pallas_call.races.races_found" in text
