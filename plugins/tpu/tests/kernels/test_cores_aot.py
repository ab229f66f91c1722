"""Attention compiled for devices of two cores: a v5p chip, and a v4 chip that is driven as one device."""

from __future__ import annotations

import functools
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dovetail_tpu.kernels.block_sizes import AttentionShape, Case, attention_blocks
from dovetail_tpu.kernels.chip import V4, V5P
from dovetail_tpu.kernels.kv_write import cache_shape
from dovetail_tpu.kernels.ragged_attention import ragged_attention
from dovetail_tpu.slices import SLICES
from dovetail_tpu.topology import topology_devices

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, the chips' compiler, is not installed"),
]
SHAPE = AttentionShape(tokens=512, requests=64, columns=128, page=32, heads=32, kv_heads=8, size=128, kv_itemsize=1)


@pytest.mark.parametrize(("chip", "driven"), [(V4, "megacore"), (V5P, "default")], ids=["v4", "v5p"])
@pytest.mark.parametrize("case", Case)
def test_compiles_for_two_cores(chip, driven, case):
    topology_devices(next(part for part in SLICES.values() if part.chip is chip))  # lets several processes compile
    device = topologies.get_topology_desc(f"{chip.name}:2x2x1", "tpu", chip_config_name=driven).devices[0]
    assert device.num_cores == chip.cores == 2
    mesh = Mesh(np.array([device]), ("x",))
    cache = cache_shape(1024 * SHAPE.page, SHAPE.kv_heads, SHAPE.size, 1)
    tables = (SHAPE.requests, SHAPE.columns), (SHAPE.requests + 1,), (SHAPE.requests,)
    arrays = [((SHAPE.tokens, SHAPE.heads, SHAPE.size), jnp.bfloat16), (cache, jnp.int8)]
    arrays += [(size, jnp.int32) for size in tables]
    given = [jax.ShapeDtypeStruct(*array, sharding=NamedSharding(mesh, PartitionSpec())) for array in arrays]
    blocks = attention_blocks(chip, case, SHAPE)
    assert blocks.cores == 2
    attend = functools.partial(ragged_attention, kv_heads=SHAPE.kv_heads, page=SHAPE.page, scale=0.1, blocks=blocks)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(attend).trace(*given).lower(lowering_platforms=("tpu",)).compile()
    assert "ragged_attention" in compiled.as_text()
