"""Every family and variant against transformers, on random weights."""

from __future__ import annotations

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
    "qwen3-tied": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True, "num_key_value_heads": 4}),
}
PROMPT = [int(token) for token in torch.randint(97, (60,), generator=torch.Generator().manual_seed(7))]


def random_model(family: str, changes: dict[str, Any]) -> transformers.PreTrainedModel:
    """A model whose every parameter matters: norms are not all one, nor biases zero."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**(TINY | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
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
