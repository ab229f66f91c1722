"""Every family in the public form; transformers is the reference."""

from __future__ import annotations

from dovetail.testing.conformance import ModelSuite, PluginSuite, registered

LAYERS = {"num_hidden_layers": 2}
TIED_WITH_BIASES = {**LAYERS, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "num_hidden_layers": 3, "max_window_layers": 1}
EXPERTS = {**LAYERS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
ALTERNATING = {"num_hidden_layers": 3, "sliding_window": 5, "sliding_window_pattern": 3}


class TestLlama(ModelSuite):
    subject = registered("llama")
    hf_config = LAYERS


class TestLlamaTiedWithBiases(ModelSuite):
    subject = registered("llama")
    hf_config = TIED_WITH_BIASES


class TestMistral(ModelSuite):
    subject = registered("mistral")
    hf_config = LAYERS


class TestQwen2(ModelSuite):
    subject = registered("qwen2")
    hf_config = SLIDING


class TestQwen3(ModelSuite):
    subject = registered("qwen3")
    hf_config = SLIDING


class TestQwen3Moe(ModelSuite):
    subject = registered("qwen3_moe")
    hf_config = EXPERTS


class TestMixtral(ModelSuite):
    subject = registered("mixtral")
    hf_config = LAYERS


class TestGemma2(ModelSuite):
    subject = registered("gemma2")
    hf_config = ALTERNATING


class TestGemma3(ModelSuite):
    subject = registered("gemma3")
    hf_config = ALTERNATING


class TestPlugin(PluginSuite):
    plugin = "models"
