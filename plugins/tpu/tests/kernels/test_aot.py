"""Kernels compiled for every generation by its own compiler, which needs no chip."""

from __future__ import annotations

import functools
import math
import re
from importlib.util import find_spec
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dovetail_tpu.kernels.block_sizes import AttentionShape, Case, attention_blocks
from dovetail_tpu.kernels.chip import CHIPS, V4, V5E, Chip
from dovetail_tpu.kernels.kv_write import cache_shape, kv_scatter, kv_write
from dovetail_tpu.kernels.ragged_attention import ragged_attention

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, the chips' compiler, is not installed"),
]

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
PAGES = 1024
LLAMA = {"requests": 64, "columns": 128, "page": 32, "heads": 32, "kv_heads": 8, "size": 128}
STEPS = {
    "decodes": (Case.DECODE, AttentionShape(tokens=64, **LLAMA)),
    "mixed": (Case.MIXED, AttentionShape(tokens=512, **LLAMA)),
    "prefill": (Case.PREFILL, AttentionShape(tokens=2048, **LLAMA)),
    "prefill of 1-byte": (Case.PREFILL, AttentionShape(tokens=512, **LLAMA, kv_itemsize=1)),
    "decodes of float32": (Case.DECODE, AttentionShape(tokens=64, **LLAMA, itemsize=4, kv_itemsize=4)),
    "one 1-byte head": (Case.DECODE, AttentionShape(tokens=64, **{**LLAMA, "kv_heads": 1, "heads": 4}, kv_itemsize=1)),
    "three heads of 96": (Case.MIXED, AttentionShape(tokens=64, **{**LLAMA, "kv_heads": 3, "heads": 21, "size": 96})),
    "32 heads of 64": (Case.MIXED, AttentionShape(tokens=64, **{**LLAMA, "kv_heads": 32, "size": 64})),
    "16 heads of 256": (Case.MIXED, AttentionShape(tokens=64, **{**LLAMA, "kv_heads": 16, "heads": 16, "size": 256})),
}
DTYPES = {1: jnp.float8_e4m3fn, 2: jnp.bfloat16, 4: jnp.float32}


class Compiled(NamedTuple):
    text: str
    memory: object
    kv_shape: tuple[int, ...]
    kv_bytes: int


@functools.cache
def mesh_of(chip: Chip) -> Mesh:
    devices = topologies.get_topology_desc(TOPOLOGIES[chip.name], "tpu").devices
    return Mesh(np.array(devices[:1]), ("x",))


def compile_step(chip: Chip, case: Case, shape: AttentionShape, store=kv_write, **options) -> Compiled:
    """Store and attend, in one program to which the cache is donated."""
    mesh = mesh_of(chip)
    blocks = attention_blocks(chip, case, shape)

    def step(kv_X2NK, q_THK, k_TNK, v_TNK, table_RB, starts_R1, lengths_R, slots_T):
        where = {"page": shape.page} if store is kv_write else {}
        kv_X2NK = store(kv_X2NK, k_TNK, v_TNK, slots_T, **where)
        attend = functools.partial(ragged_attention, kv_heads=shape.kv_heads, page=shape.page, scale=0.1, blocks=blocks)
        return kv_X2NK, attend(q_THK, kv_X2NK, table_RB, starts_R1, lengths_R, **options)

    def array(size, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    dtype, kv_dtype = DTYPES[shape.itemsize], DTYPES[shape.kv_itemsize]
    kv_shape = cache_shape(PAGES * shape.page, shape.kv_heads, shape.size, shape.kv_itemsize)
    k_TNK = array((shape.tokens, shape.kv_heads, shape.size), dtype)
    arrays = [
        array(kv_shape, kv_dtype),
        array((shape.tokens, shape.heads, shape.size), dtype),
        k_TNK,
        k_TNK,
        array((shape.requests, shape.columns)),
        array((shape.requests + 1,)),
        array((shape.requests,)),
        array((shape.tokens,), jnp.int64 if jax.config.jax_enable_x64 else jnp.int32),
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(step, donate_argnums=0).trace(*arrays).lower(lowering_platforms=("tpu",))
    compiled = lowered.compile()
    kv_bytes = math.prod(kv_shape) * shape.kv_itemsize
    return Compiled(compiled.as_text(), compiled.memory_analysis(), kv_shape, kv_bytes)


def assert_in_place(compiled: Compiled) -> None:
    """The cache is aliased, lies in order of its places, and no instruction makes another of its size."""
    assert compiled.memory.alias_size_in_bytes == compiled.kv_bytes
    assert compiled.memory.temp_size_in_bytes < compiled.kv_bytes
    size = r"\w+\[" + ",".join(map(str, compiled.kv_shape)) + r"\]"
    (layout,) = re.findall(r"entry_computation_layout=\{\(" + size + r"\{([\d,]+)", compiled.text)
    assert layout == "2,1,0"
    makers = re.findall(r"^ *(?:ROOT )?%\S+ = " + size + r"\S* ([\w-]+)\(", compiled.text, re.MULTILINE)
    assert set(makers) - {"parameter", "bitcast"} <= {"custom-call", "scatter", "fusion"}
    assert makers.count("custom-call") <= 1
    assert not re.findall(size + r".* copy-start\(", compiled.text)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("step", STEPS)
def test_compiles_in_place(chip, step):
    assert_in_place(compile_step(chip, *STEPS[step]))


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_window_and_soft_cap_compile(chip):
    assert_in_place(compile_step(chip, *STEPS["mixed"], window=1000, soft_cap=50.0))


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_scatter_compiles_in_place(chip):
    assert_in_place(compile_step(chip, *STEPS["mixed"], store=kv_scatter))


def test_compiles_beside_wide_numbers():
    with jax.enable_x64(True):
        compiled = compile_step(V5E, *STEPS["mixed"])
    assert_in_place(compiled)
    assert "f64[" not in compiled.text


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_chips_are_as_their_compiler_says(chip):
    mesh = mesh_of(chip)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        info = pltpu.get_tpu_info()
    assert mesh.devices.flat[0].device_kind == chip.kind
    assert (info.vmem_capacity_bytes, info.smem_capacity_bytes) == (chip.vmem_bytes, chip.smem_bytes)
    assert (info.mem_bw_bytes_per_second, info.bf16_ops_per_second) == (chip.hbm_bandwidth, chip.bf16_rate)
    assert (info.int8_ops_per_second > 0, info.fp8_ops_per_second > 0) == (chip.int8_products, chip.fp8_products)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_memory_of_chips_is_what_their_compiler_lets_a_program_use(chip):
    x = jax.ShapeDtypeStruct((1 << 19, 1 << 17), jnp.bfloat16, sharding=NamedSharding(mesh_of(chip), PartitionSpec()))
    lowered = jax.jit(lambda x: jnp.sin(x) @ x.T).trace(x).lower(lowering_platforms=("tpu",))
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"exceeds available HBM \({chip.hbm_bytes / 2**30:.2f}G\)"):
        lowered.compile()


def test_more_vector_memory_than_there_is_would_be_refused(monkeypatch):
    monkeypatch.setattr("dovetail_tpu.kernels.block_sizes.NAMED_SHARE", 4.0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        compile_step(V4, Case.PREFILL, AttentionShape(tokens=2048, **{**LLAMA, "kv_heads": 32}, itemsize=4))
