"""Kernels of products and norms compiled for every generation by its own compiler, which needs no chip."""

from __future__ import annotations

import functools
import math
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dovetail_tpu.experts import mixture
from dovetail_tpu.kernels.chip import CHIPS, Chip
from dovetail_tpu.kernels.grouped_matmul import grouped_matmul
from dovetail_tpu.kernels.product_tiles import groups_by_step
from dovetail_tpu.kernels.quantized_matmul import Weight, quantized_matmul
from dovetail_tpu.kernels.rms_norm import reads_once, rms_norm

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


def arrays_of(name: str, rows: int, inputs: int, outputs: int, experts: int = 1):
    """Shapes and dtypes of rows, their scales, codes, scales and zero points; and the group."""
    codes_dtype, group, quantized = WEIGHTS[name]
    group = group or inputs
    parts = 2 if codes_dtype == jnp.uint8 else 1
    columns, groups = inputs // parts, -(-inputs // group)
    steps, per_step = groups_by_step(columns, group // parts)
    scale = (experts, steps, per_step, outputs), jnp.float32
    arrays = [
        ((rows, inputs), codes_dtype if quantized else jnp.bfloat16),
        ((rows, groups), jnp.float32) if quantized else None,
        ((experts, outputs, columns), codes_dtype),
        scale,
        scale if parts == 2 else None,
    ]
    return arrays, group


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_products_compile(chip, name, size):
    arrays, group = arrays_of(name, *SIZES[size])

    def function(x_TI, x_scale_TG, codes, scale, zero):
        weight = Weight(codes, scale, zero, group)
        return quantized_matmul(x_TI, weight, x_scale_TG, out_dtype=jnp.bfloat16, chip=chip)

    compiled = compile_on(chip, function, *arrays)
    assert compiled.as_text().count("quantized_matmul")
    if size == "decodes":  # nothing of the weight's size is made
        assert compiled.memory_analysis().temp_size_in_bytes < math.prod(arrays[2][0]) / 16


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("rows", [16, 1024])
@pytest.mark.parametrize("name", ["int8", "fp8 in blocks", "pairs"])
def test_products_of_quantized_experts_compile(chip, rows, name):
    arrays, group = arrays_of(name, rows, 4096, 14336, experts=8)

    def function(x_NI, x_scale_NG, codes, scale, zero, starts_E1):
        weight = Weight(codes, scale, zero, group)
        return grouped_matmul(x_NI, weight, starts_E1, x_scale_NG, out_dtype=jnp.bfloat16, chip=chip)

    compiled = compile_on(chip, function, *arrays, ((9,), jnp.int32))
    assert compiled.as_text().count("quantized_matmul")
    assert compiled.memory_analysis().temp_size_in_bytes < math.prod(arrays[2][0])


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("tokens", [16, 512])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_mixtures_compile(chip, tokens, dtype):
    stack = (8, 2 * 7168, 4096), (8, 4096, 7168)
    compiled = compile_on(
        chip,
        functools.partial(mixture, chip=chip),
        ((tokens, 4096), dtype),
        *((shape, dtype) for shape in stack),
        ((tokens, 2), jnp.int64),
        ((tokens, 2), jnp.float32),
    )
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    assert compiled.memory_analysis().temp_size_in_bytes < math.prod(stack[1]) * jnp.dtype(dtype).itemsize


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize(("dtype", "group"), [(None, None), ("int8", None), ("float8_e4m3fn", 128)])
def test_norms_compile(chip, dtype, group):
    tokens, width = 8192, 4096
    assert reads_once(chip, tokens, width, 2, group)

    def function(x_TD, weight_D, residual_TD):
        out = rms_norm(x_TD, weight_D, residual_TD, eps=1e-6, dtype=dtype, group=group, chip=chip)
        return [array for array in out if array is not None]

    rows = (tokens, width), jnp.bfloat16
    compiled = compile_on(chip, function, rows, ((width,), jnp.bfloat16), rows)
    assert compiled.as_text().count("rms_norm")
    # nothing goes to HBM in between; but a program of the kernel alone may return its rows in another layout
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * tokens * width * 2
