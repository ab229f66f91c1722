"""Whole engines over virtual devices of the host: tokens are those of the CPU platform, which has one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

SCRIPT = """
import json, sys
from pathlib import Path

from dovetail import SamplingParams
from dovetail.contracts.executor import Progress
from dovetail.engine.engine import Engine
from dovetail.options import EngineOptions
from dovetail.plugins.host import PluginHost
from dovetail.resolver import resolve
from dovetail.runner.executor import LocalExecutor
from dovetail.testing.engines import engine_request, run_until_idle

def tokens(**options):
    asked = EngineOptions(dtype="float32", num_threads=1, **json.loads(sys.argv[1]), **options)
    config = resolve(asked, PluginHost().discover().registries)
    executor = LocalExecutor(config)
    engine = Engine(config, executor, executor.load(Progress()))
    for length in (3, 20, 9):
        for sampled in ({"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9}):
            name = f"{length} {sampled}"
            prompt = [(7 * length + 31 * place) % 100 + 3 for place in range(length)]
            engine.add(engine_request(prompt, request_id=name, max_tokens=12, ignore_eos=True, seed=5, **sampled))
    found = {name: done.token_ids for name, done in run_until_idle(engine).items()}
    engine.close()
    return found

want = tokens(platform="cpu")
import jax
assert len(jax.devices()) == int(sys.argv[2]), jax.devices()
got = tokens(platform="tpu", attention=sys.argv[3])
assert want == got, (want, got)
assert len({tuple(found) for found in want.values()}) > 3
"""
LIMITS: dict[str, Any] = {"max_model_len": 48, "max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": 16}
TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2": {"tie_word_embeddings": False},  # biases
    "Qwen3": {"vocab_size": 130},  # norms of queries and keys, a vocabulary that four do not divide
    "Gemma2": {"sliding_window": 20},  # another activation, a soft cap
    "Mixtral": {"num_local_experts": 4},
}


def run_on(devices: int, attention: str = "tpu-gather", **options: Any) -> None:
    """Compare tokens in a process that sees so many devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", SCRIPT, json.dumps(LIMITS | options), str(devices), attention]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("devices", [2, pytest.param(4, marks=pytest.mark.slow)])  # on four, heads of keys are doubled
def test_the_demo_model_gives_the_same_tokens(devices):
    run_on(devices)


@pytest.mark.slow
def test_kernels_in_pallas_give_the_same_tokens():
    run_on(2, "tpu")


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_give_the_same_tokens(family: str, devices: int, tmp_path: Path):
    random_checkpoint(family, tmp_path)
    run_on(devices, model=str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Qwen2", "Mixtral"])
def test_quantized_weights_give_the_same_tokens(family: str, tmp_path: Path):
    random_checkpoint(family, tmp_path)
    run_on(2, model=str(tmp_path), quantization="int8")


def random_checkpoint(family: str, folder: Path) -> None:
    """A tiny model of a family."""
    torch.manual_seed(3)
    model_class = getattr(transformers, f"{family}ForCausalLM")
    model_class(model_class.config_class(**(TINY | FAMILIES[family]))).eval().save_pretrained(folder)
