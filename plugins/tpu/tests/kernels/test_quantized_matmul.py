"""Products with quantized weights, on the host, against dequantized ones in float64."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from dovetail_tpu.kernels.chip import TPU7X, V4, V5E, V6E
from dovetail_tpu.kernels.quantized_matmul import Weight, quantized_matmul, scales_by_step

FP8 = jnp.dtype(jnp.float8_e4m3fn)


@dataclass(frozen=True, kw_only=True)
class Layer:
    inputs: int
    outputs: int
    codes: str
    dtype: str = "float32"
    group: int | None = None
    quantized_rows: bool = False
    chip: object = None


LAYERS = {
    "int8 weight": Layer(inputs=256, outputs=160, codes="int8"),
    "int8 weight, several steps": Layer(inputs=5000, outputs=600, codes="int8", dtype="bfloat16", chip=V5E),
    "fp8 weight, ragged": Layer(inputs=2500, outputs=70, codes="float8_e4m3fn"),
    "fp8 weight, few inputs": Layer(inputs=70, outputs=7, codes="float8_e4m3fn", dtype="bfloat16"),
    "int8 weight in groups": Layer(inputs=640, outputs=130, codes="int8", group=128),
    "fp8 weight in small groups": Layer(inputs=600, outputs=96, codes="float8_e4m3fn", group=32),
    "groups of 16": Layer(inputs=256, outputs=64, codes="int8", group=16, dtype="bfloat16"),
    "groups of 512": Layer(inputs=4300, outputs=40, codes="float8_e4m3fn", group=512, dtype="bfloat16"),
    "int8": Layer(inputs=1024, outputs=256, codes="int8", quantized_rows=True, chip=V5E),
    "int8, widened": Layer(inputs=2304, outputs=100, codes="int8", quantized_rows=True, chip=V4),
    "int8, widened for another reason": Layer(inputs=384, outputs=64, codes="int8", quantized_rows=True, chip=TPU7X),
    "int8 on the host": Layer(inputs=384, outputs=64, codes="int8", quantized_rows=True),
    "fp8": Layer(inputs=512, outputs=100, codes="float8_e4m3fn", quantized_rows=True, chip=V6E),
    "fp8, widened": Layer(inputs=512, outputs=100, codes="float8_e4m3fn", quantized_rows=True, chip=V5E),
    "fp8 in blocks": Layer(inputs=704, outputs=200, codes="float8_e4m3fn", quantized_rows=True, group=128, chip=V6E),
    "fp8 in blocks, widened": Layer(inputs=2432, outputs=96, codes="float8_e4m3fn", quantized_rows=True, group=128),
    "int8 in groups": Layer(inputs=256, outputs=64, codes="int8", quantized_rows=True, group=64, chip=V5E),
}
QUICK = {
    "int8 weight, several steps",
    "fp8 weight, ragged",
    "fp8 weight, few inputs",
    "int8",
    "int8 on the host",
    "fp8",
    "fp8 in blocks",
}
ROWS = 37


def quantized(rng, shape, dtype):
    if dtype == jnp.int8:
        return rng.integers(-127, 128, shape).astype(np.int8)
    return np.clip(rng.normal(size=shape) * 100, -448, 448).astype(dtype)


def dequantized(codes, scale, group):
    return codes.astype(np.float64) * np.repeat(scale.astype(np.float64), group, axis=1)[:, : codes.shape[1]]


class Case:
    """Random activations and a weight; what lies beside the layer's own numbers is whatever the kernel makes of it."""

    def __init__(self, layer, rows):
        rng = np.random.default_rng(layer.inputs + rows)
        group, dtype = layer.group or layer.inputs, jnp.dtype(layer.codes)
        groups = -(-layer.inputs // group)
        codes_OI = quantized(rng, (layer.outputs, layer.inputs), dtype)
        scale_OG = rng.uniform(0.001, 0.01, (layer.outputs, groups)).astype(np.float32)
        scale = scales_by_step(jnp.asarray(scale_OG)[None], layer.inputs, group)
        self.weight = Weight(jnp.asarray(codes_OI)[None], scale, None, group)
        self.x_scale_TG = None
        if layer.quantized_rows:
            self.x_TI = quantized(rng, (rows, layer.inputs), dtype)
            self.x_scale_TG = rng.uniform(0.001, 0.01, (rows, groups)).astype(np.float32)
            wide_TI = dequantized(self.x_TI, self.x_scale_TG, group)
        else:
            self.x_TI = rng.normal(size=(rows, layer.inputs)).astype(jnp.dtype(layer.dtype))
            wide_TI = self.x_TI.astype(np.float64)
        self.expected = wide_TI @ dequantized(codes_OI, scale_OG, group).T


def product(layer, case, interpret=True):
    function = functools.partial(quantized_matmul, out_dtype=layer.dtype, chip=layer.chip, interpret=interpret)
    # the group is no array
    weight = case.weight
    jitted = jax.jit(lambda x, x_scale, codes, scale: function(x, Weight(codes, scale, None, weight.group), x_scale))
    return jitted(case.x_TI, case.x_scale_TG, weight.codes_EOJ, weight.scale_ESGO)


def assert_agrees(out, expected, dtype):
    tolerance = 1e-2 if jnp.dtype(dtype) == jnp.bfloat16 else 2e-6
    largest = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(out).astype(np.float64), expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LAYERS]
)
def test_agrees_with_dequantized_products(name):
    layer = LAYERS[name]
    case = Case(layer, ROWS)
    assert_agrees(product(layer, case), case.expected, layer.dtype)


@pytest.mark.parametrize("rows", [1, 513, 600])
def test_any_number_of_rows(rows):
    layer = LAYERS["int8 weight"]
    case = Case(layer, rows)
    assert_agrees(product(layer, case), case.expected, layer.dtype)


def test_no_rows():
    layer = LAYERS["int8 weight"]
    case = Case(layer, 0)
    assert product(layer, case).shape == (0, layer.outputs)


def test_nothing_beyond_the_arrays_is_used_and_tiles_do_not_race():
    layer = Layer(inputs=2500, outputs=70, codes="float8_e4m3fn", dtype="bfloat16")
    case = Case(layer, 5)
    simulated = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")
    assert_agrees(product(layer, case, simulated), case.expected, layer.dtype)
    assert not interpret_pallas_call.races.races_found
