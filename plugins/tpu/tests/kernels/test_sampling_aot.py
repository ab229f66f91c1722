"""Sampling compiled for every generation by its own compiler, which needs no chip."""

from __future__ import annotations

import functools
import re
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dovetail_tpu.kernels.chip import CHIPS
from dovetail_tpu.kernels.logprobs import top_logprobs
from dovetail_tpu.kernels.sampling import Parameters, sample, sample_residual

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, the chips' compiler, is not installed"),
]

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
ROWS, SIZE = 64, 128257
LOGITS, WORDS = ((ROWS, SIZE), jnp.float32), ((ROWS, 2), jnp.int32)
FLOATS, INTEGERS = ((ROWS,), jnp.float32), ((ROWS,), jnp.int32)
PROGRAMS = {
    "sample": (lambda x, *columns: sample(x, Parameters(*columns)), (LOGITS, FLOATS, INTEGERS, FLOATS, FLOATS, WORDS)),
    "sample_residual": (sample_residual, (LOGITS, LOGITS, WORDS)),
    "top_logprobs": (functools.partial(top_logprobs, k=20), (LOGITS, INTEGERS)),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_without_sorts_and_wide_numbers(chip, name):
    devices = topologies.get_topology_desc(TOPOLOGIES[chip], "tpu").devices
    sharding = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
    function, arrays = PROGRAMS[name]
    with jax.enable_x64(True):
        traced = jax.jit(function).trace(*(jax.ShapeDtypeStruct(*array, sharding=sharding) for array in arrays))
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    assert not re.search(r" sort\(|TopK|[fs]64\[", compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * ROWS * SIZE * 4
