"""Kernels of products and norms compiled for every generation by its own compiler, which needs no chip."""

from __future__ import annotations

import functools
import itertools
import math

import jax.numpy as jnp
import pytest

from dovetail_tpu.experts import mixture
from dovetail_tpu.kernels.chip import CHIPS
from dovetail_tpu.kernels.grouped_matmul import grouped_matmul
from dovetail_tpu.kernels.product_tiles import groups_by_step
from dovetail_tpu.kernels.quantized_matmul import Weight, quantized_matmul
from dovetail_tpu.kernels.rms_norm import reads_once, rms_norm

pytestmark = pytest.mark.slow
on_every_chip = pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)

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


def cases(some, *values):
    """All combinations of values, of which some are compiled by ``make test-tpu-aot`` as well."""
    return [pytest.param(*case, marks=pytest.mark.aot if case in some else ()) for case in itertools.product(*values)]


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


@on_every_chip
@pytest.mark.parametrize(
    ("name", "size"),
    cases(
        [*((name, "decodes") for name in WEIGHTS), *((name, "prefill") for name in ("int8", "fp8 in blocks", "pairs"))],
        WEIGHTS,
        SIZES,
    ),
)
def test_products_compile(compile_on, chip, name, size):
    arrays, group = arrays_of(name, *SIZES[size])

    def function(x_TI, x_scale_TG, codes, scale, zero):
        weight = Weight(codes, scale, zero, group)
        return quantized_matmul(x_TI, weight, x_scale_TG, out_dtype=jnp.bfloat16, chip=chip)

    compiled = compile_on(chip, function, *arrays)
    assert compiled.as_text().count("quantized_matmul")
    if size == "decodes":  # nothing of the weight's size is made
        assert compiled.memory_analysis().temp_size_in_bytes < math.prod(arrays[2][0]) / 16


@on_every_chip
@pytest.mark.parametrize(
    ("name", "rows"),
    cases([("int8", 1024), ("fp8 in blocks", 16), ("pairs", 16)], ("int8", "fp8 in blocks", "pairs"), (16, 1024)),
)
def test_products_of_quantized_experts_compile(compile_on, chip, name, rows):
    arrays, group = arrays_of(name, rows, 4096, 14336, experts=8)

    def function(x_NI, x_scale_NG, codes, scale, zero, starts_E1):
        weight = Weight(codes, scale, zero, group)
        return grouped_matmul(x_NI, weight, starts_E1, x_scale_NG, out_dtype=jnp.bfloat16, chip=chip)

    compiled = compile_on(chip, function, *arrays, ((9,), jnp.int32))
    assert compiled.as_text().count("quantized_matmul")
    assert compiled.memory_analysis().temp_size_in_bytes < math.prod(arrays[2][0])


@on_every_chip
@pytest.mark.parametrize(("tokens", "dtype"), cases([(16, jnp.bfloat16)], (16, 512), (jnp.bfloat16, jnp.float32)))
def test_mixtures_compile(compile_on, chip, tokens, dtype):
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


@pytest.mark.aot
@on_every_chip
@pytest.mark.parametrize(("dtype", "group"), [(None, None), ("int8", None), ("float8_e4m3fn", 128)])
def test_norms_compile(compile_on, chip, dtype, group):
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
