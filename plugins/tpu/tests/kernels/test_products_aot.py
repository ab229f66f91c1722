"""Kernels of products and norms compiled for every generation by its own compiler, which needs no chip."""

from __future__ import annotations

from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dovetail_tpu.kernels.chip import CHIPS, Chip
from dovetail_tpu.kernels.quantized_matmul import Weight, quantized_matmul, scales_by_step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, the chips' compiler, is not installed"),
]

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
FP8 = jnp.float8_e4m3fn
WEIGHTS = {  # codes, group, and whether rows are quantized
    "int8": (jnp.int8, None, True),
    "int8 weight": (jnp.int8, None, False),
    "fp8": (FP8, None, True),
    "fp8 weight": (FP8, None, False),
    "fp8 in blocks": (FP8, 128, True),
    "fp8 weight in groups of 32": (FP8, 32, False),
    "pairs": (jnp.uint8, 128, False),
    "pairs in groups of 32": (jnp.uint8, 32, False),
}
SIZES = {"decodes": (64, 4096, 14336), "prefill": (2048, 11008, 4096)}


def compile_on(chip: Chip, function, *arrays):
    """Compile for one device; arrays are shapes and dtypes."""
    devices = topologies.get_topology_desc(TOPOLOGIES[chip.name], "tpu").devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    arrays = [array and jax.ShapeDtypeStruct(*array, sharding=sharding) for array in arrays]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).trace(*arrays).lower(lowering_platforms=("tpu",)).compile()


def compile_product(chip: Chip, weight: str, size: str, dtype=jnp.bfloat16):
    codes_dtype, group, quantized = WEIGHTS[weight]
    rows, inputs, outputs = SIZES[size]
    parts = 2 if codes_dtype == jnp.uint8 else 1
    columns, groups = inputs // parts, -(-inputs // (group or inputs))
    scale = jax.eval_shape(
        lambda scale: scales_by_step(scale, columns, (group or inputs) // parts),
        jax.ShapeDtypeStruct((1, outputs, groups), jnp.float32),
    )

    def function(x_TI, x_scale_TG, codes, scale, zero):
        weight = Weight(codes, scale, zero, group or inputs)
        return quantized_matmul(x_TI, weight, x_scale_TG, out_dtype=dtype, chip=chip)

    return compile_on(
        chip,
        function,
        ((rows, inputs), codes_dtype if quantized else dtype),
        ((rows, groups), jnp.float32) if quantized else None,
        ((1, outputs, columns), codes_dtype),
        (scale.shape, scale.dtype),
        (scale.shape, scale.dtype) if parts == 2 else None,
    )


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_products_compile(chip, weight, size):
    assert compile_product(chip, weight, size).as_text().count("quantized_matmul")
