"""One random tiny checkpoint per family, through the whole engine: greedy tokens equal transformers', and in 8 bits
they are the same whether or not the input of a layer is quantized as it is computed.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dovetail.layers.linear import Linear
from dovetail.testing.engines import engine_request, run_until_idle
from dovetail_quant.w8a8 import W8A8

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
MIXED = {"use_sliding_window": True, "sliding_window": 20}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": 20}),
    "qwen2": ("Qwen2", {**MIXED, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {**MIXED, "layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 64}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "mlp_only_layers": [1]}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": 20}),
    "gemma2": ("Gemma2", {"sliding_window": 20, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3", {"sliding_window": 20, "sliding_window_pattern": 3, "num_hidden_layers": 6}),
}
COUNT = 40


CASES = [("cpu", family) for family in FAMILIES] + [
    ("ladder", "qwen2"),
    ("ladder", "gemma3"),
    ("reference", "mistral"),
    ("reference", "mixtral"),
]


def random_checkpoint(family: str, path: Path) -> transformers.PreTrainedModel:
    """Save a random model of a family; returns transformers' own."""
    name, changes = FAMILIES[family]
    torch.manual_seed(3)
    model_class = getattr(transformers, f"{name}ForCausalLM")
    theirs = model_class(model_class.config_class(**(TINY | changes))).eval()
    theirs.save_pretrained(path)
    return theirs


@pytest.mark.parametrize(("platform", "family"), CASES)
def test_greedy_equals_transformers(make_engine, tmp_path: Path, family: str, platform: str) -> None:
    theirs = random_checkpoint(family, tmp_path)
    rng = random.Random(5)
    shared = [rng.randrange(128) for _ in range(35)]
    prompts = [shared + [rng.randrange(128) for _ in range(n)] for n in (1, 9, 30)]
    prompts += [[rng.randrange(128) for _ in range(n)] for n in (3, 50)]
    engine = make_engine(tmp_path, platform, max_model_len=128, max_num_seqs=4, max_num_batched_tokens=24)
    for _ in range(2):  # the second time from the prefix cache
        for i, prompt in enumerate(prompts):
            engine.add(engine_request(prompt, request_id=str(i), max_tokens=COUNT))
        completions = run_until_idle(engine)
        for i, prompt in enumerate(prompts):
            ids = torch.tensor([prompt])
            mask = torch.ones_like(ids)
            with torch.inference_mode():
                tokens = theirs.generate(ids, attention_mask=mask, max_new_tokens=COUNT, do_sample=False)
            assert completions[str(i)].token_ids == tokens[0, len(prompt) :].tolist(), f"prompt {i}"
    assert engine.stats().prefix_hits > 0


@pytest.mark.parametrize("method", ["int8-w8a8", "fp8-w8a8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_quantized_at_once(make_engine, tmp_path: Path, monkeypatch, family: str, method: str) -> None:
    random_checkpoint(family, tmp_path)
    prompts = [random.Random(n).choices(range(128), k=n) for n in (1, 9, 30)]
    forms, forward_rows = [], Linear.forward_rows
    monkeypatch.setattr(Linear, "forward_rows", lambda self, x: (forms.append(type(x)), forward_rows(self, x))[1])

    def outputs():
        engine = make_engine(tmp_path, quantization=method, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=24)
        for i, prompt in enumerate(prompts):
            engine.add(engine_request(prompt, request_id=str(i), max_tokens=8, prompt_logprobs=0))
        completions = run_until_idle(engine)
        return [(completions[str(i)].token_ids, completions[str(i)].prompt_logprobs) for i in range(len(prompts))]

    at_once = outputs()
    assert tuple in forms
    forms.clear()
    monkeypatch.setattr(W8A8, "row_product", lambda self: None)
    assert outputs() == at_once
    assert tuple not in forms
