"""Whole engines over virtual devices of the host: tokens are those of the CPU platform, which has one.

Those of a cache that the CPU platform does not have are the same as by one of these devices.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = Iterator[tuple[str, Tensor]]

SCRIPT = """
import ast, json, sys
from pathlib import Path

import msgspec

from dovetail import SamplingParams
from dovetail.contracts.executor import Progress
from dovetail.engine.engine import Engine
from dovetail.options import EngineOptions
from dovetail.plugins.host import PluginHost
from dovetail.resolver import resolve
from dovetail.runner.executor import LocalExecutor
from dovetail.testing.engines import engine_request, run_until_idle

def tokens(devices=None, **options):
    asked = EngineOptions(dtype="float32", num_threads=1, **json.loads(sys.argv[1]), **options)
    config = resolve(asked, PluginHost().discover().registries)
    if devices:
        section = config.platform_options | {"devices": devices}
        config = msgspec.structs.replace(config, platform_options=section)
    executor = LocalExecutor(config)
    engine = Engine(config, executor, executor.load(Progress()))
    for length in (3, 20, 9):
        for sampled in ast.literal_eval(sys.argv[4]):
            name = f"{length} {sampled}"
            prompt = [(7 * length + 31 * place) % 100 + 3 for place in range(length)]
            engine.add(engine_request(prompt, request_id=name, max_tokens=12, ignore_eos=True, seed=5, **sampled))
    found = {name: done.token_ids for name, done in run_until_idle(engine).items()}
    engine.close()
    return found

want = tokens(**json.loads(sys.argv[5]))
from dovetail_tpu import bridges
got = tokens(platform="tpu", attention=sys.argv[3])
assert bridges.current().num_devices == int(sys.argv[2])
assert want == got, (want, got)
assert len({tuple(found) for found in want.values()}) > 3
"""
SAMPLINGS: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9}]
RULES: list[dict[str, Any]] = [
    {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"temperature": 1.0, "frequency_penalty": 0.7, "logit_bias": {9: 2.0}, "allowed_token_ids": [*range(5, 90)]},
]
CPU: dict[str, Any] = {"platform": "cpu"}
LIMITS: dict[str, Any] = {"max_model_len": 48, "max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": 16}
TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
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


SECTIONS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False},
    "gptq, in order of importance": {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": True},
    "fp8 in blocks": {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"},
    "fp8, static": {"quant_method": "fp8", "activation_scheme": "static"},
}


def run_on(
    devices: int,
    attention: str = "tpu-gather",
    samplings: Sequence[dict[str, Any]] = SAMPLINGS,
    beside: dict[str, Any] = CPU,
    **options: Any,
) -> None:
    """Compare tokens in a process that sees so many devices with those of another platform, or of fewer devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [
        sys.executable,
        "-c",
        SCRIPT,
        json.dumps(LIMITS | options),
        str(devices),
        attention,
        repr([*samplings]),
        json.dumps(beside),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("devices", [2, pytest.param(4, marks=pytest.mark.slow)])  # on four, heads of keys are doubled
def test_the_demo_model_gives_the_same_tokens(devices):
    run_on(devices)


@pytest.mark.slow
def test_kernels_in_pallas_give_the_same_tokens():
    run_on(2, "tpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "attention", "kv_dtype"),
    [(2, "tpu-gather", "int8"), (2, "tpu", "int8"), (4, "tpu-gather", "int8"), (2, "tpu-gather", "float8_e4m3fn")],
)
def test_narrow_caches_give_the_same_tokens(devices: int, attention: str, kv_dtype: str, tmp_path: Path):
    random_checkpoint("Qwen3", tmp_path)  # whose tokens depend on its cache more than the demo model's
    alone = {"platform": "tpu", "attention": attention, "devices": 1}
    run_on(devices, attention, beside=alone, model=str(tmp_path), kv_cache_dtype=kv_dtype)


@pytest.mark.slow
def test_rules_give_the_same_tokens():
    run_on(2, samplings=RULES)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_give_the_same_tokens(family: str, devices: int, tmp_path: Path):
    random_checkpoint(family, tmp_path)
    run_on(devices, model=str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("method", ["int8", "fp8", "int8-w8a8", "fp8-w8a8"])
@pytest.mark.parametrize("family", ["Qwen2", "Mixtral"])
def test_quantized_weights_give_the_same_tokens(family: str, method: str, devices: int, tmp_path: Path):
    random_checkpoint(family, tmp_path)
    run_on(devices, model=str(tmp_path), quantization=method)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize(
    ("family", "section"),
    [("Qwen2", name) for name in SECTIONS] + [("Mixtral", name) for name in ("awq", "gptq", "fp8 in blocks")],
)
def test_quantized_checkpoints_give_the_same_tokens(family: str, section: str, devices: int, tmp_path: Path):
    random_checkpoint(family, tmp_path)
    quantize_checkpoint(tmp_path, SECTIONS[section])
    run_on(devices, model=str(tmp_path))


@pytest.mark.slow
def test_groups_of_inputs_that_would_be_cut_are_refused(tmp_path: Path):
    random_checkpoint("Qwen2", tmp_path, num_attention_heads=8)
    quantize_checkpoint(tmp_path, SECTIONS["awq"])
    with pytest.raises(AssertionError, match=r"4 inputs, or groups .* do not divide evenly among 8 devices"):
        run_on(8, model=str(tmp_path))


def random_checkpoint(family: str, folder: Path, **sizes: int) -> None:
    """A tiny model of a family."""
    torch.manual_seed(3)
    model_class = getattr(transformers, f"{family}ForCausalLM")
    model_class(model_class.config_class(**(TINY | FAMILIES[family] | sizes))).eval().save_pretrained(folder)


def quantize_checkpoint(folder: Path, section: dict[str, Any]) -> None:
    """Put random quantized weights in the place of a checkpoint's."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if re.search(r"(_proj|\.w\d)\.weight$", name)]:
        stem, weight_OI = name.removesuffix(".weight"), tensors.pop(name)
        tensors |= {
            f"{stem}.{suffix}": tensor for suffix, tensor in FORMATS[section["quant_method"]](weight_OI, section)
        }
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}))


def four_bits(weight_OI: Tensor, section: dict[str, Any]) -> Tensors:
    """Any words are weights."""
    outputs, inputs = weight_OI.shape
    group = section["group_size"]
    yield "qweight", words(inputs, outputs // 8) if section["quant_method"] == "awq" else words(inputs // 8, outputs)
    yield "qzeros", words(inputs // group, outputs // 8)
    yield "scales", torch.rand(inputs // group, outputs) * 0.03 + 0.02
    if section.get("desc_act"):
        yield "g_idx", torch.arange(inputs, dtype=torch.int32).flip(0) // group


def words(*shape: int) -> Tensor:
    """Random int32."""
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32)


def eight_bits(weight_OI: Tensor, section: dict[str, Any]) -> Tensors:
    """Numbers of the whole range, with scales of blocks, or with one."""
    block = section.get("weight_block_size")
    yield "weight", (weight_OI * 100).to(torch.float8_e4m3fn)
    if block:
        yield (
            "weight_scale_inv",
            torch.rand(*(-(-size // own) for size, own in zip(weight_OI.shape, block, strict=True))) * 0.02,
        )
    else:
        yield "weight_scale", torch.tensor(0.01)
        yield "input_scale", torch.tensor(0.05)


FORMATS = {"awq": four_bits, "gptq": four_bits, "fp8": eight_bits}
