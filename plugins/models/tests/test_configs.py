"""Reading config.json: rotary tables against transformers', defaults, and refusals that name the field."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dovetail.contracts.model import Model
from dovetail.errors import ConfigError
from dovetail.hookspecs import Register
from dovetail.layers.rotary import frequencies
from dovetail.plugins.manifest import ModelManifest
from dovetail_models import plugin
from dovetail_models.experts import Mixture
from dovetail_models.fields import Fields
from dovetail_models.gemma2 import Gemma2
from dovetail_models.gemma3 import Gemma3
from dovetail_models.llama import Llama
from dovetail_models.mistral import Mistral
from dovetail_models.mixtral import Mixtral
from dovetail_models.qwen2 import Qwen2
from dovetail_models.qwen3 import Qwen3
from dovetail_models.qwen3_moe import Qwen3Moe
from dovetail_models.rope import read_rope

BASE = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
LLAMA_31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "section",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
        LLAMA_31,
        LLAMA_31 | {"factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0},
        YARN,
        YARN | {"beta_fast": 64.0},
        YARN | {"beta_slow": 4.0, "truncate": False},
        YARN | {"attention_factor": 0.9},
        YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
        YARN | {"factor": 1.0},
        YARN | {"factor": None},
    ],
    ids=lambda section: "-".join(f"{key}={value}" for key, value in section.items() if key[:4] != "orig"),
)
def test_frequencies_equal_transformers(section: dict[str, Any], head_dim: int, theta: float) -> None:
    config = {**BASE, "max_position_embeddings": 131072, "head_dim": head_dim}
    config["rope_parameters"] = {**section, "rope_theta": theta}
    rope = read_rope(Fields(config), head_dim)
    theirs = LlamaConfig(**{**config, "rope_parameters": dict(config["rope_parameters"])})
    inv_freq, magnitude = ROPE_INIT_FUNCTIONS[section["rope_type"]](theirs, torch.device("cpu"))
    torch.testing.assert_close(rope.frequencies_K, inv_freq, rtol=1e-6, atol=0)
    assert rope.magnitude == pytest.approx(magnitude)


def test_table_layout() -> None:
    """Cosines in the first half, sines in the second, magnitude on both."""
    rope = read_rope(Fields({**BASE, "rope_scaling": YARN | {"attention_factor": 0.5}}), 16)
    table = rope.table(40, torch.device("cpu"))
    assert table.shape == (40, 16)
    assert table.dtype == torch.float32
    angles = torch.arange(40).double().unsqueeze(1) * rope.frequencies_K.double()
    expected = 0.5 * torch.cat([angles.cos(), angles.sin()], dim=1)
    torch.testing.assert_close(table.double(), expected, rtol=0, atol=1e-5)


def test_context_length() -> None:
    """YaRN stretches the context by its factor; the other kinds state it in max_position_embeddings."""

    def positions(section: dict[str, Any], **more: int) -> int:
        return Llama.facts({**BASE, "rope_parameters": section, **more}).max_positions

    assert positions({}) == 4096
    assert positions({"rope_type": "linear", "factor": 4.0}) == 4096
    assert positions({"rope_type": "dynamic", "factor": 4.0}) == 4096
    assert positions(LLAMA_31, max_position_embeddings=131072) == 131072
    assert positions(YARN, max_position_embeddings=40960) == 131072
    assert positions({"rope_type": "yarn", "factor": 2.0}) == 8192


def test_facts() -> None:
    facts = Llama.facts({**BASE, "torch_dtype": "bfloat16"})
    assert (facts.vocab_size, facts.dtype, len(facts.attention)) == (100, torch.bfloat16, 3)
    spec = facts.attention[0]
    assert (spec.num_heads, spec.num_kv_heads, spec.head_size, spec.scale) == (4, 2, 16, 0.25)
    assert spec.window is spec.soft_cap is None
    assert Llama.facts({**BASE, "dtype": "float16", "torch_dtype": "bfloat16"}).dtype == torch.float16
    assert Llama.facts(BASE).dtype == torch.float32


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        (Mistral, {}, [4096] * 3),
        (Mistral, {"sliding_window": None}, [None] * 3),
        (Mistral, {"sliding_window": 9}, [9] * 3),
        (Qwen2, {"sliding_window": 9}, [None] * 3),
        (Qwen2, {"sliding_window": 9, "use_sliding_window": True}, [None] * 3),
        (Qwen2, {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0}, [9] * 3),
        (Qwen2, {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2}, [None, None, 9]),
        (Qwen2, {"use_sliding_window": True, "max_window_layers": 1}, [None, 4096, 4096]),
        (Qwen3, {"layer_types": ["full_attention"] * 3}, [None] * 3),
        (
            Qwen3,
            {
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "use_sliding_window": True,
                "sliding_window": 9,
            },
            [9, None, 9],
        ),
    ],
)
def test_windows(family: type[Model], changes: dict[str, Any], expected: list[int | None]) -> None:
    assert [spec.window for spec in family.facts({**BASE, **changes}).attention] == expected


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        (Gemma2, {}, [4096, None, 4096]),
        (Gemma2, {"sliding_window": 9, "layer_types": ["full_attention", "sliding_attention"] * 2}, [None, 9] * 2),
        (Gemma3, {"sliding_window": 9}, [9, 9, 9, 9, 9, None, 9]),
        (Gemma3, {"sliding_window": 9, "sliding_window_pattern": 2}, [9, None, 9]),
        (Gemma3, {"sliding_window": None, "sliding_window_pattern": 1}, [None]),
        (Mixtral, {}, [None] * 3),
        (Mixtral, {"sliding_window": 9}, [9] * 3),
        (Qwen3Moe, {"sliding_window": 9, "max_window_layers": 2}, [None] * 3),
        (Qwen3Moe, {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2}, [9] * 3),
    ],
)
def test_windows_of_later_families(family: type[Model], changes: dict[str, Any], expected: list[int | None]) -> None:
    config = {**BASE, "num_hidden_layers": len(expected), **changes}
    assert [spec.window for spec in family.facts(config).attention] == expected


def test_soft_caps_and_scales() -> None:
    spec = Gemma2.facts(BASE).attention[0]
    assert (spec.head_size, spec.scale, spec.soft_cap) == (256, 1 / 16, 50.0)
    spec = Gemma2.facts({**BASE, "query_pre_attn_scalar": 144, "attn_logit_softcapping": None}).attention[0]
    assert (spec.scale, spec.soft_cap) == (1 / 12, None)
    assert Gemma2.parse(BASE).logit_soft_cap == 30.0
    assert Gemma2.parse({**BASE, "final_logit_softcapping": None}).logit_soft_cap is None
    assert Gemma3.facts(BASE).attention[0].soft_cap is Gemma3.parse(BASE).logit_soft_cap is None
    assert Gemma3.parse({**BASE, "final_logit_softcapping": 5}).logit_soft_cap == 5.0
    assert Gemma2.parse(BASE).tied
    assert not Gemma3.parse({**BASE, "tie_word_embeddings": False}).tied


def test_every_layer_has_the_positions_of_its_kind() -> None:
    old = {**BASE, "num_hidden_layers": 6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "head_dim": 16}
    nested = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
    for config in (old, {**old, "rope_scaling": None, "rope_parameters": nested}):
        sliding, full = Gemma3.parse(config).ropes[4:]
        torch.testing.assert_close(full.frequencies_K, frequencies(16, 1e6) / 8)
        torch.testing.assert_close(sliding.frequencies_K, frequencies(16, 1e4))


def test_which_layers_have_experts() -> None:
    def layers(**changes: Any) -> list[int]:
        config = Qwen3Moe.parse({**BASE, "num_hidden_layers": 6, **changes})
        return [layer for layer, mixture in enumerate(config.mixtures) if mixture is not None]

    assert layers() == [0, 1, 2, 3, 4, 5]
    assert layers(decoder_sparse_step=2) == [1, 3, 5]
    assert layers(decoder_sparse_step=2, mlp_only_layers=[0, 3]) == [1, 5]
    assert layers(mlp_only_layers=[0, 1, 2, 3, 4, 5]) == []


def test_experts() -> None:
    assert Mixtral.parse(BASE).mixture == Mixture(num_experts=8, num_active=2, inner_size=96, normalize=True)
    changes = {"num_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True}
    expected = Mixture(num_experts=16, num_active=3, inner_size=24, normalize=True)
    assert Qwen3Moe.parse({**BASE, **changes}).mixtures[0] == expected
    changes["num_local_experts"] = changes.pop("num_experts")
    assert Qwen3Moe.parse({**BASE, **changes}).mixtures[0] == expected
    assert Qwen3Moe.parse(BASE).mixtures[0] == Mixture(num_experts=128, num_active=8, inner_size=768, normalize=False)


def test_head_size_defaults() -> None:
    assert Qwen2.facts(BASE).attention[0].head_size == 16
    assert Qwen3.facts(BASE).attention[0].head_size == 128
    assert Qwen3.facts({**BASE, "head_dim": 32}).attention[0].head_size == 32
    assert Llama.facts({**BASE, "head_dim": None, "num_key_value_heads": None}).attention[0].num_kv_heads == 4


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        (Llama, {"hidden_act": "gelu"}, "'hidden_act' in config.json is 'gelu'; it must be 'silu'"),
        (Llama, {"hidden_size": None}, "no 'hidden_size'"),
        (Llama, {"hidden_size": "64"}, "'hidden_size' in config.json is '64'; it must be a positive integer"),
        (Llama, {"vocab_size": True}, "'vocab_size'"),
        (Llama, {"num_hidden_layers": 0}, "'num_hidden_layers' in config.json is 0"),
        (Llama, {"rms_norm_eps": -1}, "'rms_norm_eps' in config.json is -1; it must be a positive number"),
        (Llama, {"attention_bias": "yes"}, "'attention_bias' in config.json is 'yes'; it must be true or false"),
        (Llama, {"dtype": "int8"}, "'dtype' in config.json is 'int8'"),
        (Llama, {"torch_dtype": "float64"}, "'torch_dtype' in config.json is 'float64'"),
        (Llama, {"num_key_value_heads": 3}, "'num_key_value_heads' in config.json is 3; it must be a divisor"),
        (Llama, {"hidden_size": 66}, "'hidden_size' in config.json is 66; it must be a multiple"),
        (Llama, {"head_dim": 15}, "head size is 15"),
        (Llama, {"rope_scaling": [1]}, "'rope_scaling' in config.json is [1]; it must be an object"),
        (Llama, {"rope_scaling": {"type": "longrope"}}, "'type' in rope_scaling of config.json is 'longrope'"),
        (Llama, {"rope_parameters": {"rope_type": "x"}}, "'rope_type' in rope_parameters of config.json is 'x'"),
        (Llama, {"rope_scaling": {"type": "linear"}}, "rope_scaling of config.json has no 'factor'"),
        (Llama, {"rope_scaling": {"type": "linear", "factor": 0}}, "'factor' in rope_scaling of config.json is 0"),
        (Llama, {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' in config.json is 0.5"),
        (Llama, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "'partial_rotary_factor' in rope_parameters"),
        (Llama, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "share one table"),
        (Mistral, {"sliding_window": 0}, "'sliding_window' in config.json is 0"),
        (Qwen2, {"layer_types": ["full_attention"]}, "'layer_types' in config.json is ['full_attention']"),
        (Qwen2, {"layer_types": ["chunked_attention"] * 3}, "'layer_types'"),
        (Qwen3, {"layer_types": ["sliding_attention"] * 3}, "use_sliding_window is false"),
        (Gemma2, {"hidden_activation": "gelu"}, "'hidden_activation' in config.json is 'gelu'"),
        (Gemma2, {"final_logit_softcapping": 0}, "'final_logit_softcapping' in config.json is 0"),
        (Gemma2, {"attn_logit_softcapping": "no"}, "'attn_logit_softcapping' in config.json is 'no'"),
        (Gemma2, {"query_pre_attn_scalar": -1}, "'query_pre_attn_scalar' in config.json is -1"),
        (Gemma2, {"use_bidirectional_attention": True}, "'use_bidirectional_attention' in config.json is True"),
        (Gemma2, {"sliding_window": None}, "'sliding_window' in config.json is None; it must be a positive integer"),
        (Gemma2, {"layer_types": ["full_attention"]}, "'layer_types' in config.json is ['full_attention']"),
        (Gemma2, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "share one table"),
        (Gemma3, {"text_config": BASE}, "'text_config' in config.json is"),
        (
            Gemma3,
            {"attn_logit_softcapping": 50.0},
            "'attn_logit_softcapping' in config.json is 50.0; it must be absent",
        ),
        (Gemma3, {"sliding_window_pattern": 0}, "'sliding_window_pattern' in config.json is 0"),
        (
            Gemma3,
            {"sliding_window": None, "layer_types": ["sliding_attention"] * 3},
            "names sliding_attention, but sliding_window is null",
        ),
        (Gemma3, {"rope_parameters": {"rope_theta": 1e4}}, "must be an object of full_attention and sliding_attention"),
        (
            Gemma3,
            {"rope_parameters": {"full_attention": {"rope_type": "linear"}}},
            "full_attention of rope_parameters of config.json has no 'factor'",
        ),
        (Mixtral, {"hidden_act": "gelu"}, "'hidden_act' in config.json is 'gelu'"),
        (Mixtral, {"num_local_experts": 1}, "'num_experts_per_tok' in config.json is None; it must be at most"),
        (Mixtral, {"num_local_experts": 4, "num_experts_per_tok": 5}, "at most the number of experts, 4"),
        (Qwen3Moe, {"num_experts": 0}, "'num_experts' in config.json is 0"),
        (Qwen3Moe, {"mlp_only_layers": [3]}, "'mlp_only_layers' in config.json is [3]; it must be a list of layers, 0"),
        (Qwen3Moe, {"norm_topk_prob": 1}, "'norm_topk_prob' in config.json is 1"),
        (Qwen3Moe, {"decoder_sparse_step": 0}, "'decoder_sparse_step' in config.json is 0"),
    ],
)
def test_refusals_name_the_field(family: type[Model], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        family.facts({**BASE, **changes})
    assert words in str(error.value)


def test_errors_show_the_beginning_of_long_values() -> None:
    with pytest.raises(ConfigError) as error:
        Gemma3.facts({**BASE, "text_config": BASE})
    assert str(error.value).endswith("…; it must be absent in this family.")
    assert len(str(error.value)) < 200


def test_hook_registers_every_family() -> None:
    seen: dict[str, str] = {}

    def register(manifest: ModelManifest, target: str) -> None:
        seen[manifest.name] = target

    check: Register[ModelManifest] = register
    plugin.dovetail_register_models(check)
    assert list(seen) == ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma2", "gemma3"]


def test_mixtures_need_number_formats_for_experts() -> None:
    assert Mixtral.facts(BASE).needs == Qwen3Moe.facts(BASE).needs == {"experts"}
    assert Llama.facts(BASE).needs == frozenset()
