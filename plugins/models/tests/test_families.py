"""Every family and variant against transformers, on random weights."""

from __future__ import annotations

import copy
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dovetail_models.plugin import FAMILIES

TARGETS = {manifest.architectures[0]: target for manifest, target in FAMILIES}
TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}
BANDED = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SLIDING = {"use_sliding_window": True, "sliding_window": 5}
EXPERTS = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
SOFT = {"head_dim": 8, "query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}
SCALED = {
    "head_dim": 8,
    "sliding_window": 5,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e4},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    },
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-one-kv-head": ("Llama", {"num_key_value_heads": 1}),
    "llama-multi-head": ("Llama", {"num_key_value_heads": 4}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 20}),
    "llama-eps": ("Llama", {"rms_norm_eps": 0.1}),
    "llama-theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama-dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}),
    "llama-banded": (
        "Llama",
        {"rope_parameters": {**BANDED, "original_max_position_embeddings": 32, "rope_theta": 1e3}},
    ),
    "llama-yarn": ("Llama", {"rope_parameters": {**YARN, "rope_theta": 1e4}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-sliding": ("Mistral", {"sliding_window": 5, "head_dim": 12}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-sliding": ("Qwen2", {**SLIDING, "max_window_layers": 1}),
    "qwen2-yarn": (
        "Qwen2",
        {"rope_parameters": {**YARN, "rope_theta": 1e6, "beta_fast": 16.0, "truncate": False, "attention_factor": 1.3}},
    ),
    "qwen2-yarn-mscale": (
        "Qwen2",
        {"rope_parameters": {**YARN, "rope_theta": 1e4, "mscale": 0.7, "mscale_all_dim": 1.2}},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-biases": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
    "qwen3-sliding": (
        "Qwen3",
        {**SLIDING, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "qwen3-moe": ("Qwen3Moe", {**EXPERTS, "num_experts_per_tok": 3, "num_experts": 7}),
    "qwen3-moe-normalised": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": True, "head_dim": 12, "attention_bias": True}),
    "qwen3-moe-sparse-step": ("Qwen3Moe", {**EXPERTS, "decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "qwen3-moe-dense-layers": ("Qwen3Moe", {**EXPERTS, "mlp_only_layers": [0], **SLIDING}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "mixtral-sliding": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 1, "sliding_window": 5}),
    "mixtral-all-experts": (
        "Mixtral",
        {"num_local_experts": 3, "num_experts_per_tok": 3, "head_dim": 12, "tie_word_embeddings": True},
    ),
    "gemma2": ("Gemma2", {**SOFT, "sliding_window": 5, "num_hidden_layers": 4}),
    "gemma2-no-caps": (
        "Gemma2",
        {"head_dim": 8, "sliding_window": 5, "final_logit_softcapping": None, "attn_logit_softcapping": None},
    ),
    "gemma2-layer-types": (
        "Gemma2",
        {
            **SOFT,
            "sliding_window": 5,
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "gemma2-yarn": ("Gemma2", {**SOFT, "rope_parameters": {**YARN, "rope_theta": 1e4}, "num_key_value_heads": 1}),
    "gemma3": ("Gemma3", {"head_dim": 8, "sliding_window": 5, "num_hidden_layers": 7}),
    "gemma3-pattern": (
        "Gemma3",
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 5,
            "sliding_window_pattern": 2,
            "final_logit_softcapping": 2.0,
            "attention_bias": True,
        },
    ),
    "gemma3-scaled": (
        "Gemma3",
        {
            **SCALED,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "tie_word_embeddings": False,
        },
    ),
    "gemma3-scaled-pattern": ("Gemma3", {**SCALED, "sliding_window_pattern": 3}),
    "qwen3-tied": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True, "num_key_value_heads": 4}),
}
PROMPT = [int(token) for token in torch.randint(97, (60,), generator=torch.Generator().manual_seed(7))]


def random_model(family: str, changes: dict[str, Any]) -> transformers.PreTrainedModel:
    """A model whose every parameter matters: norms are not all one, nor biases zero."""
    torch.manual_seed(1)
    changes = copy.deepcopy(changes)  # configs complete their sections in place
    model_class = getattr(transformers, f"{family}ForCausalLM")
    model = model_class(model_class.config_class(**(TINY | changes))).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def family_of(path: Path) -> Any:
    """The registered class for a checkpoint."""
    architecture = json.loads((path / "config.json").read_text())["architectures"][0]
    module, _, name = TARGETS[architecture].partition(":")
    return getattr(import_module(module), name)


def assert_equal(theirs: transformers.PreTrainedModel, ours: Any, prompt: list[int], count: int) -> None:
    """Logits within 1e-4 of the largest, and the same greedy tokens."""
    with torch.inference_mode():
        expected = theirs(torch.tensor([prompt])).logits[0]
        tokens = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=count, do_sample=False
        )
    error = (ours.logits(prompt) - expected).abs().max() / expected.abs().max()
    assert error < 1e-4
    assert ours.greedy(prompt, count) == tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_transformers(variant: str, dense: Any, tmp_path: Path) -> None:
    theirs = random_model(*VARIANTS[variant])
    theirs.save_pretrained(tmp_path)
    assert_equal(theirs, dense(family_of(tmp_path), tmp_path), PROMPT, 40)


def test_older_config_spelling(dense: Any, tmp_path: Path) -> None:
    """``rope_theta``, ``rope_scaling`` and ``torch_dtype``, as files before transformers 5 have them."""
    theirs = random_model(*VARIANTS["llama-banded"])
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["torch_dtype"] = config.pop("dtype")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope | {"type": rope.pop("rope_type")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_equal(theirs, dense(family_of(tmp_path), tmp_path), PROMPT, 20)


def test_older_spelling_of_layer_types(dense: Any, tmp_path: Path) -> None:
    """A pattern, and the two rotary bases apart, as files before transformers 5 have them."""
    theirs = random_model(*VARIANTS["gemma3-scaled-pattern"])
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["torch_dtype"] = config.pop("dtype")
    config["rope_theta"] = rope["full_attention"].pop("rope_theta")
    config["rope_local_base_freq"] = rope["sliding_attention"].pop("rope_theta")
    config["rope_scaling"] = rope["full_attention"]
    config["sliding_window_pattern"] = config.pop("_sliding_window_pattern")
    for left_out in ("layer_types", "tie_word_embeddings"):
        config.pop(left_out)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_equal(theirs, dense(family_of(tmp_path), tmp_path), PROMPT, 20)


def test_older_spelling_of_experts(dense: Any, tmp_path: Path) -> None:
    theirs = random_model(*VARIANTS["qwen3-moe"])
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_equal(theirs, dense(family_of(tmp_path), tmp_path), PROMPT, 20)


@pytest.mark.parametrize("variant", ["gemma2", "gemma3"])
def test_half_precision(variant: str, dense: Any, tmp_path: Path) -> None:
    """As near to the float32 model as transformers in bfloat16 is; rounding ``1 + weight`` would add a fifth."""
    exact = random_model(*VARIANTS[variant]).bfloat16().float()
    exact.save_pretrained(tmp_path)
    half = dense(family_of(tmp_path), tmp_path, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = exact(torch.tensor([PROMPT])).logits[0]
        theirs = exact.bfloat16()(torch.tensor([PROMPT])).logits[0].float()
    ours = half.logits(PROMPT).float()
    error = (ours - expected).square().mean() / (theirs - expected).square().mean()
    assert error < 1.15


def test_sharded_checkpoint(dense: Any, tmp_path: Path) -> None:
    theirs = random_model(*VARIANTS["qwen3"])
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_equal(theirs, dense(family_of(tmp_path), tmp_path), PROMPT, 20)


def test_demo_checkpoint(dense: Any) -> None:
    """The embedded demo: trained weights, stored in bfloat16, computed in float32."""
    package, _, folder = next(m.demo for m, _ in FAMILIES if m.demo).partition(":")
    path = Path(str(import_module(package).__file__)).parent / folder
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    messages = [{"role": "user", "content": "Tell me a story about a fox."}]
    for prompt in (
        tokenizer.encode("Once upon a time there was a king who"),
        tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"],
    ):
        theirs.generation_config.eos_token_id = None
        assert_equal(theirs, dense(family_of(path), path), list(prompt), 64)
