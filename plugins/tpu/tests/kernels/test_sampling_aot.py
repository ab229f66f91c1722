"""Sampling compiled for every generation by its own compiler, which needs no chip."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from dovetail_tpu.kernels.chip import CHIPS
from dovetail_tpu.kernels.logprobs import top_logprobs
from dovetail_tpu.kernels.sampling import Parameters, sample, sample_residual

pytestmark = [pytest.mark.slow, pytest.mark.aot]

ROWS, SIZE = 64, 32001
LOGITS, WORDS = ((ROWS, SIZE), jnp.float32), ((ROWS, 2), jnp.int32)
FLOATS, INTEGERS = ((ROWS,), jnp.float32), ((ROWS,), jnp.int32)
PROGRAMS = {
    "sample": (lambda x, *columns: sample(x, Parameters(*columns)), (LOGITS, FLOATS, INTEGERS, FLOATS, FLOATS, WORDS)),
    "sample_residual": (sample_residual, (LOGITS, LOGITS, WORDS)),
    "top_logprobs": (functools.partial(top_logprobs, k=20), (LOGITS, INTEGERS)),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_compiles_without_sorts_and_wide_numbers(compile_on, chip, name):
    function, arrays = PROGRAMS[name]
    with jax.enable_x64(True):
        compiled = compile_on(chip, function, *arrays)
    assert not re.search(r" sort\(|TopK|[fs]64\[", compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * ROWS * SIZE * 4
