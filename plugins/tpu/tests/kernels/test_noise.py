"""Noise on the chip, against the core's."""

import jax
import numpy as np
import pytest
import torch

from dovetail.ops import random
from dovetail_tpu.kernels import noise

SEEDS = [0, 1, -1, 2**62 + 12345, -(2**63), 123456789]
POSITIONS = [0, 7, 2**40, 3, 99, 2**31]
uniform, gumbel = jax.jit(noise.uniform), jax.jit(noise.gumbel)


def keys_of(stream=random.Stream.SAMPLE):
    return random.row_keys(torch.tensor(SEEDS), torch.tensor(POSITIONS), stream)


def words(keys_S):
    """Halves of keys, the lower one first."""
    return keys_S.numpy().view(np.int32).reshape(-1, 2)


@pytest.mark.parametrize("stream", list(random.Stream))
@pytest.mark.parametrize("columns", [[0], range(1030), [128256, 19968244, 2**31 - 1, 3]], ids=["1", "1030", "far"])
def test_uniform_is_the_cores_bit_for_bit(stream, columns):
    keys_S, columns = keys_of(stream), torch.tensor([*columns])
    expected_SC = random.uniform(keys_S, columns).numpy()
    found_SC = np.asarray(uniform(words(keys_S), columns.numpy().astype(np.int32)))
    assert found_SC.dtype == np.float32
    np.testing.assert_array_equal(found_SC.view(np.int32), expected_SC.view(np.int32))


def test_the_largest_bits_do_not_round_to_one():
    keys_S = random.row_keys(torch.tensor([0]), torch.tensor([0]), random.Stream.SAMPLE)
    column = np.int32([19968244])
    assert np.asarray(uniform(words(keys_S), column)) == 1 - 2**-24
    assert np.isfinite(np.asarray(gumbel(words(keys_S), column))).all()


def test_gumbel_is_as_exact_as_the_cores():
    keys_S, columns = keys_of(), torch.arange(5000)
    exact_SC = -np.log(-np.log1p(-random.uniform(keys_S, columns).double().numpy()))
    error = np.abs(np.asarray(gumbel(words(keys_S), columns.numpy())) - exact_SC)
    assert (error <= 3e-7 * np.maximum(1, np.abs(exact_SC))).all()


def test_wide_numbers_change_nothing():
    narrow = uniform(words(keys_of()), np.arange(130, dtype=np.int32))
    with jax.enable_x64(True):
        wide = uniform(words(keys_of()), np.arange(130, dtype=np.int64))
    np.testing.assert_array_equal(np.asarray(narrow), np.asarray(wide))
    assert wide.dtype == np.float32
