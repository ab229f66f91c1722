"""Programs of the TPU platform, executed on the host: a model of every family, in every number format, gives the greedy
tokens of the CPU platform in fp32.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dovetail.contracts.executor import Progress
from dovetail.engine.engine import Engine
from dovetail.options import EngineOptions
from dovetail.plugins.host import PluginHost
from dovetail.resolver import resolve
from dovetail.runner.executor import LocalExecutor
from dovetail.testing.engines import engine_request, run_until_idle

from .test_families import FAMILIES, random_checkpoint

COUNT = 16
LIMITS = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": 16}
PROMPTS = [random.Random(n).choices(range(128), k=n) for n in (1, 9, 30, 35)]
GROUP = 32
TPU = {"platform": "tpu", "attention": "tpu-gather"}
MODELS = Path(os.environ.get("DOVETAIL_TEST_MODELS", "/nonexistent"))


@pytest.fixture(autouse=True)
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs execute there."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def greedy(model: Path, **options: Any) -> list[list[int]]:
    """Tokens of each prompt."""
    asked = EngineOptions(**{"model": str(model), "dtype": "float32", **LIMITS, **options})
    config = resolve(asked, PluginHost().discover().registries)
    executor = LocalExecutor(config)
    engine = Engine(config, executor, executor.load(Progress()))
    try:
        for i, prompt in enumerate(PROMPTS):
            engine.add(engine_request(prompt, request_id=str(i), max_tokens=COUNT, ignore_eos=True))
        completions = run_until_idle(engine)
    finally:
        engine.close()
    return [completions[str(i)].token_ids for i in range(len(PROMPTS))]


def assert_same_tokens(model: Path, **options: Any) -> None:
    """On both platforms, of which one computes by the kernels."""
    expected = greedy(model, **options)
    assert greedy(model, **TPU, **options) == expected
    assert len({*map(tuple, expected)}) == len(PROMPTS)


@pytest.mark.parametrize("family", [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES])
def test_families(tmp_path: Path, family: str) -> None:
    random_checkpoint(family, tmp_path)
    assert_same_tokens(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["int8", "fp8", "int8-w8a8", "fp8-w8a8"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_quantized_on_load(tmp_path: Path, family: str, method: str) -> None:
    random_checkpoint(family, tmp_path)
    assert_same_tokens(tmp_path, quantization=method)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_four_bits(tmp_path: Path, family: str, method: str) -> None:
    random_checkpoint(family, tmp_path)
    quantize(tmp_path, method)
    assert_same_tokens(tmp_path)


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("method", [None, "int8-w8a8"])
@pytest.mark.parametrize("name", ["fable-30m", "fable-moe"])
def test_trained_models(name: str, method: str | None) -> None:
    if not (MODELS / name).is_dir():
        pytest.skip(f"DOVETAIL_TEST_MODELS names no folder with {name}")
    assert_same_tokens(MODELS / name, **({} if method is None else {"quantization": method}))


def quantize(folder: Path, method: str) -> None:
    """Random weights of 4 bits in place of random wide ones."""
    section = {"quant_method": method, "bits": 4, "group_size": GROUP}
    section |= {"zero_point": True, "version": "gemm"} if method == "awq" else {"desc_act": False}
    file, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    stored: dict[str, Tensor] = {}
    for name, tensor in load_file(file).items():
        layer = name.removesuffix(".weight")
        is_linear = tensor.ndim == 2 and layer.rpartition(".")[2] not in ("lm_head", "embed_tokens", "gate")
        parts = four_bits(*tensor.shape, method) if is_linear else {"weight": tensor}
        stored |= {f"{layer}.{suffix}" if is_linear else name: part for suffix, part in parts.items()}
    save_file(stored, file)


def four_bits(outputs: int, inputs: int, method: str) -> dict[str, Tensor]:
    """The tensors of a layer; every word says something."""
    shape = (inputs, outputs // 8) if method == "awq" else (inputs // 8, outputs)
    groups = inputs // GROUP
    return {
        "qweight": torch.randint(-(2**31), 2**31, shape).to(torch.int32),
        "qzeros": torch.randint(-(2**31), 2**31, (groups, outputs // 8)).to(torch.int32),
        "scales": torch.rand(groups, outputs) * 0.06,
    }
