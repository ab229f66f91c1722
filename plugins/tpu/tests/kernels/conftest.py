"""Kernels compile for chips that this machine has not."""

from __future__ import annotations

import functools
from importlib.util import find_spec

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dovetail_tpu.kernels.chip import Chip
from dovetail_tpu.slices import SLICES
from dovetail_tpu.topology import topology_devices


@pytest.fixture(scope="session")
def mesh_of():
    """The mesh of one device of a generation."""
    if find_spec("libtpu") is None:
        pytest.skip("libtpu, the chips' compiler, is not installed")

    @functools.cache
    def mesh_of(chip: Chip) -> Mesh:
        smallest = next(part for part in SLICES.values() if part.chip is chip)
        return Mesh(np.array(topology_devices(smallest)[:1]), ("x",))

    return mesh_of


@pytest.fixture(scope="session")
def compile_on(mesh_of):
    """``(chip, function, *arrays, donate=())``: a function for one device; arrays are shapes and dtypes, or None."""

    def compile_on(chip: Chip, function, *arrays, donate=()):
        sharding = NamedSharding(mesh_of(chip), PartitionSpec())
        given = [array and jax.ShapeDtypeStruct(*array, sharding=sharding) for array in arrays]
        with jax.sharding.use_abstract_mesh(mesh_of(chip).abstract_mesh):
            traced = jax.jit(function, donate_argnums=donate).trace(*given)
            return traced.lower(lowering_platforms=("tpu",)).compile()

    return compile_on
