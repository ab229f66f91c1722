"""What every model family does, on a tiny checkpoint with random weights."""

from typing import ClassVar

from dovetail.testing.conformance import ModelSuite, PluginSuite, registered


class TestModel(ModelSuite):
    subject = registered("sketch")
    hf_config: ClassVar = {
        "architectures": ["SketchForCausalLM"],
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "dtype": "float32",
    }


class TestPlugin(PluginSuite):
    plugin = "sketch"
