"""The family: grouped-query attention with rotary positions, and a gated feed-forward part."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dovetail.contracts.attention import AttentionSpec
from dovetail.contracts.model import Model, ModelContext, ModelFacts, Rename, StepAttention, WeightTable
from dovetail.errors import ConfigError
from dovetail.layers.attention import SelfAttention
from dovetail.layers.decoder import Decoder, DecoderLayer
from dovetail.layers.head import Head
from dovetail.layers.mlp import GatedMLP
from dovetail.layers.rotary import frequencies, rotary_table

RENAMES = (
    Rename("q_proj", "qkv_proj", "q"),
    Rename("k_proj", "qkv_proj", "k"),
    Rename("v_proj", "qkv_proj", "v"),
    Rename("gate_proj", "gate_up_proj", "gate"),
    Rename("up_proj", "gate_up_proj", "up"),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class SketchModel(Model):
    """Members of the family differ in size alone."""

    @classmethod
    def facts(cls, hf_config: Mapping[str, Any]) -> ModelFacts:
        """Read config.json; refuse what would change the mathematics."""
        dtype = hf_config.get("dtype", "float32")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ConfigError(f"'dtype' in config.json is {dtype!r}; it must be one of {', '.join(DTYPES)}.")
        return ModelFacts(
            attention=[attention(hf_config)] * size(hf_config, "num_hidden_layers"),
            vocab_size=size(hf_config, "vocab_size"),
            max_positions=size(hf_config, "max_position_embeddings"),
            dtype=DTYPES[dtype],
        )

    def __init__(self, hf_config: Mapping[str, Any], context: ModelContext) -> None:
        super().__init__(hf_config, context)
        vocab_size, hidden_size = size(hf_config, "vocab_size"), size(hf_config, "hidden_size")
        inner_size = size(hf_config, "intermediate_size")
        eps = number(hf_config, "rms_norm_eps", 1e-6)
        spec = attention(hf_config)
        angles = frequencies(spec.head_size, number(hf_config, "rope_theta", 10000.0))
        cos_sin_PK = rotary_table(angles, context.max_model_len, context.device)
        layers = []
        for i in range(size(hf_config, "num_hidden_layers")):
            name = f"model.layers.{i}"
            self_attention = SelfAttention(context, f"{name}.self_attn", i, spec, hidden_size, cos_sin_PK)
            mlp = GatedMLP(context, f"{name}.mlp", hidden_size, inner_size)
            layers.append(DecoderLayer(context, self_attention, mlp, hidden_size=hidden_size, norm_eps=eps))
        self.model = Decoder(context, layers, vocab_size=vocab_size, hidden_size=hidden_size, norm_eps=eps)
        self.lm_head = Head(context, "lm_head", hidden_size, vocab_size)

    def weight_table(self) -> WeightTable:
        """How names of a checkpoint map to this model's."""
        return WeightTable(renames=RENAMES)

    def forward(self, token_ids_T: Tensor, positions_T: Tensor, attend: StepAttention) -> Tensor:
        """Hidden states ``[T, D]`` after the final norm."""
        hidden_TD: Tensor = self.model(token_ids_T, positions_T, attend)
        return hidden_TD

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Logits ``[S, V]``."""
        logits_SV: Tensor = self.lm_head(hidden_SD)
        return logits_SV


def attention(hf_config: Mapping[str, Any]) -> AttentionSpec:
    """The attention of every layer."""
    heads, kv_heads = size(hf_config, "num_attention_heads"), size(hf_config, "num_key_value_heads")
    head_size = size(hf_config, "head_dim")
    if heads % kv_heads:
        raise ConfigError(f"'num_key_value_heads' in config.json is {kv_heads}; it must divide {heads} heads.")
    if head_size % 2:
        raise ConfigError(f"'head_dim' in config.json is {head_size}; rotary positions need an even one.")
    return AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_size=head_size, scale=head_size**-0.5)


def size(hf_config: Mapping[str, Any], name: str) -> int:
    """A field that must be there."""
    value = hf_config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name!r} in config.json is {value!r}; it must be a positive integer.")
    return value


def number(hf_config: Mapping[str, Any], name: str, default: float) -> float:
    """A field with a default."""
    value = hf_config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"{name!r} in config.json is {value!r}; it must be a positive number.")
    return float(value)
