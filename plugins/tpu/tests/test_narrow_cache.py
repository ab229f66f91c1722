"""Whole engines with a KV cache of one byte per element, beside the CPU platform's float32."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dovetail import LLM, SamplingParams
from dovetail.errors import ConfigError

DEMO = str(files("dovetail_models") / "checkpoints/fable-4m")
MODELS = Path(os.environ.get("DOVETAIL_TEST_MODELS", "/nonexistent"))
LIMITS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 64,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "block_size": 16,
}
PROMPTS = ["Once upon a time there was a fox", "The king said to the queen: come with me. " * 3, "Then the miller"]
SCORED = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
NEAR = {"int8": (0.04, 0.2), "float8_e4m3fn": (0.16, 0.9)}
"""Largest mean and largest single deviation of a token's log-probability: about twice what was seen."""
BACKENDS = ("tpu-gather", "tpu")


def scores(model: str, **options: Any) -> np.ndarray:
    """Log-probabilities of all tokens of the prompts, of which each sees those before it in the cache alone."""
    with LLM(model, **LIMITS, **options) as llm:
        outputs = llm.generate(PROMPTS, SCORED, use_tqdm=False)
    tokens = [scored for output in outputs for scored in output.prompt_logprobs or () if scored]
    return np.array([next(iter(scored.values())).logprob for scored in tokens])


def assert_near(model: str, attention: str, kv_dtype: str) -> None:
    expected = scores(model, platform="cpu")
    found = scores(model, platform="tpu", attention=attention, kv_cache_dtype=kv_dtype)
    error, (mean, most) = np.abs(found - expected), NEAR[kv_dtype]
    assert len(error) > 40
    assert 1e-4 < error.mean() < mean  # the cache is not of float32 after all
    assert error.max() < most


def test_int8():
    assert_near(DEMO, "tpu-gather", "int8")


@pytest.mark.slow
@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("kv_dtype", NEAR)
def test_by_either_backend(attention, kv_dtype):
    assert_near(DEMO, attention, kv_dtype)


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("name", ["fable-30m", "fable-moe"])
def test_trained_models(name):
    if not (MODELS / name).is_dir():
        pytest.skip(f"DOVETAIL_TEST_MODELS names no folder with {name}")
    assert_near(str(MODELS / name), "tpu-gather", "int8")


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_others_refuse_what_they_cannot_store(kv_dtype):
    """None falls back to another dtype."""
    platform = {"int8": "cpu", "int4": "tpu"}[kv_dtype]
    with pytest.raises(ConfigError, match=f"cannot store the KV cache as {kv_dtype}; choose --kv-cache-dtype"):
        LLM(DEMO, **LIMITS, platform=platform, kv_cache_dtype=kv_dtype)
