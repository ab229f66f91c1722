"""Attention and what stores for it, compiled for every generation by its own compiler, which needs no chip."""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from dovetail_tpu.kernels.block_sizes import AttentionShape, Case, attention_blocks
from dovetail_tpu.kernels.chip import CHIPS, V4, V5E
from dovetail_tpu.kernels.kv_write import cache_shape, kv_scatter, kv_write
from dovetail_tpu.kernels.ragged_attention import ragged_attention

pytestmark = pytest.mark.slow
on_every_chip = pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)

PAGES = 1024
LLAMA = {"requests": 64, "columns": 128, "page": 32, "heads": 32, "kv_heads": 8, "size": 128}
BF16, FP8, INT8, FLOAT = jnp.bfloat16, jnp.float8_e4m3fn, jnp.int8, jnp.float32


class Step(NamedTuple):
    """Of one layer, with the dtypes of its activations and its cache."""

    case: Case
    shape: AttentionShape
    dtype: type
    kv_dtype: type

    @property
    def cache(self) -> tuple[tuple[int, ...], type]:
        shape = self.shape
        return cache_shape(PAGES * shape.page, shape.kv_heads, shape.size, shape.kv_itemsize), self.kv_dtype

    @property
    def stored(self) -> list[tuple[tuple[int, ...], type]]:
        """Keys, values, and where they go."""
        shape = self.shape
        new = (shape.tokens, shape.kv_heads, shape.size), self.dtype
        return [new, new, ((shape.tokens,), jnp.int64 if jax.config.jax_enable_x64 else jnp.int32)]


def step_of(case: Case, tokens: int, kv_dtype: type = BF16, dtype: type = BF16, **changes: int) -> Step:
    sizes = {"itemsize": jnp.dtype(dtype).itemsize, "kv_itemsize": jnp.dtype(kv_dtype).itemsize}
    return Step(case, AttentionShape(tokens=tokens, **{**LLAMA, **changes}, **sizes), dtype, kv_dtype)


STEPS = {
    "decodes": step_of(Case.DECODE, 64),
    "prefill": step_of(Case.PREFILL, 2048),
    "decodes of fp8": step_of(Case.DECODE, 64, FP8),
    "prefill of int8": step_of(Case.PREFILL, 512, INT8),
}
MIXED = step_of(Case.MIXED, 512)
OTHERS = {
    "mixed": MIXED,
    "prefill of fp8": step_of(Case.PREFILL, 512, FP8),
    "decodes of float32": step_of(Case.DECODE, 64, FLOAT, FLOAT),
    "one fp8 head": step_of(Case.DECODE, 64, FP8, kv_heads=1, heads=4),
    "one int8 head": step_of(Case.DECODE, 64, INT8, kv_heads=1, heads=4),
    "three heads of 96": step_of(Case.MIXED, 64, kv_heads=3, heads=21, size=96),
    "32 heads of 64": step_of(Case.MIXED, 64, kv_heads=32, size=64),
    "16 heads of 256": step_of(Case.MIXED, 64, kv_heads=16, heads=16, size=256),
}


@pytest.fixture
def compile_step(compile_on):
    """``(chip, step, **options of attention)``: a program that stores and attends, to which the cache is donated."""

    def compile_step(chip, step, **options):
        case, shape, dtype, _ = step
        blocks = attention_blocks(chip, case, shape)
        attend = functools.partial(ragged_attention, kv_heads=shape.kv_heads, page=shape.page, scale=0.1, blocks=blocks)

        def program(kv_X2NK, q_THK, table_RB, starts_R1, lengths_R, *stored):
            kv_X2NK = kv_write(kv_X2NK, *stored, page=shape.page)
            return kv_X2NK, attend(q_THK, kv_X2NK, table_RB, starts_R1, lengths_R, **options)

        queries = (shape.tokens, shape.heads, shape.size), dtype
        sizes = (shape.requests, shape.columns), (shape.requests + 1,), (shape.requests,)
        tables = [(size, jnp.int32) for size in sizes]
        return compile_on(chip, program, step.cache, queries, *tables, *step.stored, donate=0)

    return compile_step


def assert_in_place(compiled, step: Step) -> None:
    """The cache is aliased, lies in order of its places, and no instruction makes another of its size."""
    shape, dtype = step.cache
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert memory.alias_size_in_bytes == math.prod(shape) * jnp.dtype(dtype).itemsize > memory.temp_size_in_bytes
    size = r"\w+\[" + ",".join(map(str, shape)) + r"\]"
    (layout,) = re.findall(r"entry_computation_layout=\{\(" + size + r"\{([\d,]+)", text)
    assert layout == "2,1,0"
    makers = re.findall(r"^ *(?:ROOT )?%\S+ = " + size + r"\S* ([\w-]+)\(", text, re.MULTILINE)
    assert set(makers) - {"parameter", "bitcast"} <= {"custom-call", "scatter", "fusion"}
    assert makers.count("custom-call") <= 1
    assert not re.findall(size + r".* copy-start\(", text)


@pytest.mark.aot
@on_every_chip
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_compiles_in_place(compile_step, chip, step):
    assert_in_place(compile_step(chip, step), step)


@on_every_chip
@pytest.mark.parametrize("step", OTHERS.values(), ids=OTHERS)
def test_other_layers_compile_in_place(compile_step, chip, step):
    assert_in_place(compile_step(chip, step), step)


@pytest.mark.aot
@on_every_chip
def test_window_and_soft_cap_compile(compile_step, chip):
    assert_in_place(compile_step(chip, MIXED, window=1000, soft_cap=50.0), MIXED)


@pytest.mark.aot
@on_every_chip
@pytest.mark.parametrize("step", [MIXED, STEPS["prefill of int8"]], ids=["bfloat16", "int8"])
def test_scatter_compiles_in_place(compile_on, chip, step):
    assert_in_place(compile_on(chip, kv_scatter, step.cache, *step.stored, donate=0), step)


@pytest.mark.aot
def test_compiles_beside_wide_numbers(compile_step):
    with jax.enable_x64(True):
        compiled = compile_step(V5E, MIXED)
        assert_in_place(compiled, MIXED)
    assert "f64[" not in compiled.as_text()


@pytest.mark.aot
@on_every_chip
def test_chips_are_as_their_compiler_says(mesh_of, chip):
    mesh = mesh_of(chip)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        info = pltpu.get_tpu_info()
    assert mesh.devices.flat[0].device_kind == chip.kind
    assert (info.vmem_capacity_bytes, info.smem_capacity_bytes) == (chip.vmem_bytes, chip.smem_bytes)
    assert (info.mem_bw_bytes_per_second, info.bf16_ops_per_second) == (chip.hbm_bandwidth, chip.bf16_rate)
    assert (info.int8_ops_per_second > 0, info.fp8_ops_per_second > 0) == (chip.int8_products, chip.fp8_products)


@pytest.mark.aot
@on_every_chip
def test_memory_of_chips_is_what_their_compiler_lets_a_program_use(compile_on, chip):
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"exceeds available HBM \({chip.hbm_bytes / 2**30:.2f}G\)"):
        compile_on(chip, lambda x: x + 1, ((1 << 19, 1 << 17), BF16))


def test_more_vector_memory_than_there_is_would_be_refused(compile_step, monkeypatch):
    monkeypatch.setattr("dovetail_tpu.kernels.block_sizes.NAMED_SHARE", 4.0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        compile_step(V4, step_of(Case.PREFILL, 2048, FLOAT, FLOAT, kv_heads=32))
