"""Products of rows with their own experts' weights, on the host, against a loop in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_tpu.kernels.chip import V5E
from dovetail_tpu.kernels.grouped_matmul import grouped_matmul, max_tiles, plan_groups
from dovetail_tpu.kernels.quantized_matmul import Weight, scales_by_step

EXPERTS = 5
ROWS = 103
COUNTS = [(0, 0, 0, 0, 0), (1, 0, 0, 0, 0), (0, 0, 0, 0, 7), (3, 0, 41, 1, 0), (33, 32, 31, 0, 5)]
FP8 = jnp.dtype(jnp.float8_e4m3fn)
WEIGHTS = {  # codes, inputs, outputs, group, whether rows are quantized, dtype
    "plain": ("float32", 100, 40, None, False, "float32"),
    "plain, several steps": ("bfloat16", 2100, 130, None, False, "bfloat16"),
    "int8": ("int8", 256, 40, None, True, "float32"),
    "int8 weights": ("int8", 96, 64, None, False, "bfloat16"),
    "fp8 in blocks": ("float8_e4m3fn", 384, 40, 128, True, "bfloat16"),
    "pairs": ("uint8", 256, 40, 128, False, "float32"),
}


def rows_of(counts):
    """Where experts' rows begin, of which the first is row 2, and the expert of each row."""
    starts = 2 + np.concatenate([[0], np.cumsum(counts)])
    experts = [None, None, *np.repeat(np.arange(EXPERTS), counts)]
    return starts, experts + [None] * (ROWS - len(experts))


@functools.cache
def product(group, dtype):
    def function(x, x_scale, codes, scale, zero, starts):
        weight = Weight(codes, scale, zero, group)
        return grouped_matmul(x, weight, starts, x_scale, out_dtype=dtype, chip=V5E, interpret=True)

    return jax.jit(function)


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_agrees_with_each_expert_alone(weight):
    codes, inputs, outputs, group, quantized_rows, dtype = weight
    rng, group = np.random.default_rng(inputs), group or inputs
    groups, parts, zero = -(-inputs // group), 1, None
    scale_EOG = rng.uniform(0.01, 0.1, (EXPERTS, outputs, groups)).astype(np.float32)
    if codes == "uint8":
        values, parts = rng.integers(0, 16, (EXPERTS, outputs, inputs)), 2
        zero_EOG = rng.integers(0, 16, scale_EOG.shape)
        codes_EOJ = (values[:, :, ::2] | values[:, :, 1::2] << 4).astype(np.uint8)
        zero = scales_by_step(jnp.asarray(zero_EOG), inputs // 2, group // 2)
        values = values - np.repeat(zero_EOG, group, axis=2)
    else:
        codes_EOJ = values = (rng.normal(size=(EXPERTS, outputs, inputs)) * 30).astype(jnp.dtype(codes))
    is_plain = jnp.dtype(codes).itemsize > 1
    scale = None if is_plain else scales_by_step(jnp.asarray(scale_EOG), inputs // parts, group // parts)
    wide_EOI = values.astype(np.float64) * (1 if is_plain else np.repeat(scale_EOG, group, axis=2).astype(np.float64))
    for counts in COUNTS:
        starts, experts = rows_of(counts)
        x_NI = (rng.normal(size=(len(experts), inputs)) * 30).astype(jnp.dtype(codes if quantized_rows else dtype))
        x_scale = rng.uniform(0.1, 1, (len(experts), groups)).astype(np.float32) if quantized_rows else None
        out_NO = product(group, dtype)(x_NI, x_scale, codes_EOJ, scale, zero, starts)
        wide_NI = x_NI.astype(np.float64)
        wide_NI = wide_NI * np.repeat(x_scale, group, axis=1) if quantized_rows else wide_NI
        zeros = np.zeros(outputs)
        expected = np.stack([zeros if e is None else wide_EOI[e] @ x for e, x in zip(experts, wide_NI, strict=True)])
        assert out_NO.dtype == jnp.dtype(dtype)
        atol = (1e-2 if dtype == "bfloat16" else 5e-6) * np.abs(expected).max()
        out_NO = np.asarray(out_NO).astype(np.float64)
        np.testing.assert_allclose(out_NO, expected, rtol=0, atol=atol, err_msg=f"{counts}")


def test_tiles_have_one_expert_each():
    counts = (5, 0, 4, 9, 0)
    starts, _ = rows_of(counts)
    plan = jax.jit(lambda starts: plan_groups(starts, sum(counts) + 3, 4))(starts)
    assert plan.tile == 4
    assert plan.experts.tolist() == [0, 0, 2, 3, 3, 3, 4, 4, 4, 4, 6]
    places = plan.place_N[2:-1].tolist()
    assert len(set(places)) == sum(counts)
    assert np.asarray(plan.row_M)[places].tolist() == list(range(2, 2 + sum(counts)))
    tiles = np.asarray(plan.experts)[np.array(places) // 4]
    assert tiles.tolist() == np.repeat(np.arange(EXPERTS), counts).tolist()
    assert plan.has_expert_N.tolist() == [False] * 2 + [True] * sum(counts) + [False]


@pytest.mark.parametrize("tile", [1, 3, 32])
def test_there_are_tiles_enough(tile):
    rng = np.random.default_rng(tile)
    for _ in range(300):
        counts = rng.integers(0, 40, rng.integers(1, 6)) * rng.integers(0, 2, 1)
        assert sum(-(-count // tile) for count in counts) <= max_tiles(int(counts.sum()), len(counts), tile)
