"""Products with weights of 4 bits, on the host, against dequantized ones in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_tpu.kernels.chip import V5E
from dovetail_tpu.kernels.int4_matmul import int4_matmul, multiplies_pairs

LAYERS = {  # inputs, outputs, group, dtype, zero points
    "groups of 128": (512, 200, 128, "float32", True),
    "groups of 128, bfloat16": (2816, 520, 128, "bfloat16", True),
    "symmetric": (768, 96, 128, "bfloat16", False),
    "groups of 64": (320, 130, 64, "float32", True),
    "groups of 32": (224, 40, 32, "float32", True),
    "groups of 256": (1280, 64, 256, "bfloat16", True),
    "one group": (1100, 90, 1100, "float32", True),
    "symmetric, one group": (8500, 33, 8500, "float32", False),
    "groups that no lanes hold": (96, 20, 24, "float32", True),
    "groups of 2": (24, 5, 2, "float32", False),
}


@functools.cache
def product(group, chip=V5E):
    return jax.jit(functools.partial(int4_matmul, group=group, chip=chip, interpret=True))


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_agrees_with_dequantized_products(layer):
    inputs, outputs, group, dtype, has_zeros = layer
    rows = 30
    rng = np.random.default_rng(inputs)
    values_OI = rng.integers(0, 16, (outputs, inputs))
    pairs_OJ = (values_OI[:, ::2] | values_OI[:, 1::2] << 4).astype(np.uint8)
    scale_OG = rng.uniform(0.01, 0.1, (outputs, inputs // group)).astype(jnp.dtype(dtype))
    zero_OG = rng.integers(0, 17, scale_OG.shape).astype(scale_OG.dtype) if has_zeros else None
    zero_OI = np.repeat(zero_OG.astype(np.float64), group, axis=1) if has_zeros else 8.0
    weight_OI = (values_OI - zero_OI) * np.repeat(scale_OG.astype(np.float64), group, axis=1)
    x_TI = rng.normal(size=(rows, inputs)).astype(jnp.dtype(dtype))
    out_TO = product(group)(x_TI, pairs_OJ, scale_OG, zero_OG)
    expected_TO = x_TI.astype(np.float64) @ weight_OI.T
    tolerance = 1e-2 if dtype == "bfloat16" else 5e-6
    assert out_TO.dtype == x_TI.dtype
    out_TO, largest = np.asarray(out_TO).astype(np.float64), np.abs(expected_TO).max()
    np.testing.assert_allclose(out_TO, expected_TO, rtol=0, atol=tolerance * largest)


def test_many_rows_are_multiplied_with_widened_weights():
    assert multiplies_pairs(64, 2048, 128, V5E)
    assert not multiplies_pairs(2048, 2048, 128, V5E)  # two groups in a register
    assert multiplies_pairs(2048, 2048, 256, V5E)
    assert not multiplies_pairs(1, 2048, 24, V5E)
    assert not multiplies_pairs(1, 2048, 3, V5E)


def test_no_rows():
    out_TO = product(8)(np.zeros((0, 16), np.float32), np.zeros((3, 8), np.uint8), np.ones((3, 2), np.float32), None)
    assert out_TO.shape == (0, 3)
