"""Tiny checkpoints of random weights, and engines over them; folders of tests share helpers by fixture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dovetail.contracts.executor import Progress
from dovetail.engine.engine import Engine
from dovetail.options import EngineOptions
from dovetail.plugins.host import PluginHost
from dovetail.resolver import resolve
from dovetail.runner.executor import LocalExecutor
from dovetail.testing.engines import Completion, engine_request, run_until_idle

HIDDEN, INNER, HEADS, KV_HEADS, HEAD, VOCAB, LAYERS, EXPERTS = 144, 104, 4, 2, 20, 96, 2, 3
"""No size is a multiple of 128, and few are of 16."""
SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
    "eos_token_id": None,
}
DENSE = {**SHARED, "architectures": ["LlamaForCausalLM"], "intermediate_size": INNER, "attention_bias": True}
SPARSE = {
    **SHARED,
    "architectures": ["Qwen3MoeForCausalLM"],
    "intermediate_size": INNER,
    "moe_intermediate_size": INNER,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
CONFIGS = {"dense": DENSE, "sparse": SPARSE}
Quantize = Callable[[str, Tensor], dict[str, Tensor]]


def _shapes(kind: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    yield "lm_head.weight", (VOCAB, HIDDEN)
    yield "model.norm.weight", (HIDDEN,)
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}.weight", (HIDDEN,)
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            yield f"{layer}.self_attn.{part}_proj.weight", (heads * HEAD, HIDDEN)
            if kind == "dense":
                yield f"{layer}.self_attn.{part}_proj.bias", (heads * HEAD,)
            elif part != "v":
                yield f"{layer}.self_attn.{part}_norm.weight", (HEAD,)
        yield f"{layer}.self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD)
        if kind == "dense":
            yield f"{layer}.self_attn.o_proj.bias", (HIDDEN,)
        else:
            yield f"{layer}.mlp.gate.weight", (EXPERTS, HIDDEN)
        for mlp in [f"{layer}.mlp"] if kind == "dense" else [f"{layer}.mlp.experts.{e}" for e in range(EXPERTS)]:
            yield f"{mlp}.gate_proj.weight", (INNER, HIDDEN)
            yield f"{mlp}.up_proj.weight", (INNER, HIDDEN)
            yield f"{mlp}.down_proj.weight", (HIDDEN, INNER)


class Checkpoints:
    """Writes checkpoints of the same random weights."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def write(self, kind: str, quantize: Quantize | None = None, **config: Any) -> Path:
        """A folder. ``quantize`` gets each projection's name and weight, and returns what is stored, by suffix."""
        self._count += 1
        path = self._folder / f"{kind}-{self._count}"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(CONFIGS[kind] | config))
        generator = torch.Generator().manual_seed(7)
        stored: dict[str, Tensor] = {}
        for name, shape in _shapes(kind):
            tensor = torch.randn(shape, generator=generator) * (0.1 if len(shape) > 1 else 1)
            if quantize is not None and name.endswith("_proj.weight"):
                layer = name.removesuffix(".weight")
                stored |= {f"{layer}.{suffix}": value for suffix, value in quantize(layer, tensor).items()}
            else:
                stored[name] = tensor
        save_file(stored, path / "model.safetensors")
        return path


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    """A writer into the test's folder."""
    return Checkpoints(tmp_path)


Generate = Callable[..., list[Completion]]


@pytest.fixture
def generate() -> Generate:
    """Run all prompts together on the CPU platform; returns their completions in order."""

    def run(model: Path, prompts: Sequence[Sequence[int]], quantization: str | None = None, **options: Any) -> Any:
        small = {"max_model_len": 96, "max_num_seqs": 4, "max_num_batched_tokens": 24, "num_threads": 2}
        given = {"model": str(model), "dtype": "float32", "quantization": quantization, **small, **options}
        params = {"max_tokens": given.pop("max_tokens", 12), "prompt_logprobs": given.pop("prompt_logprobs", None)}
        config = resolve(EngineOptions(**given), PluginHost().discover().registries)
        executor = LocalExecutor(config)
        engine = Engine(config, executor, executor.load(Progress()))
        for i, prompt in enumerate(prompts):
            engine.add(engine_request(prompt, request_id=str(i), **params))
        completions = run_until_idle(engine)
        engine.close()
        return [completions[str(i)] for i in range(len(prompts))]

    return run
