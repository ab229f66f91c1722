"""Llama 2, 3 and later dense models of the same shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dovetail.contracts.model import ModelContext
from dovetail.layers.attention import SelfAttention
from dovetail.layers.decoder import DecoderLayer
from dovetail.layers.mlp import GatedMLP
from dovetail_models.attention import read_attention
from dovetail_models.decoder import DecoderConfig, DecoderModel
from dovetail_models.fields import Fields
from dovetail_models.rope import read_rope


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaConfig(DecoderConfig):
    """What config.json says."""

    intermediate_size: int
    attention_bias: bool
    mlp_bias: bool


class Llama(DecoderModel[LlamaConfig]):
    """Decoder of pre-norm layers with grouped-query attention and a gated MLP."""

    @classmethod
    def parse(cls, hf_config: Mapping[str, Any]) -> LlamaConfig:
        """Every layer has the same attention."""
        fields = Fields(hf_config)
        fields.choice("hidden_act", ("silu",), "silu")
        layers, attention = fields.integer("num_hidden_layers"), read_attention(fields)
        return LlamaConfig(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            attention=(attention,) * layers,
            ropes=(read_rope(fields, attention.head_size),) * layers,
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            attention_bias=fields.switch("attention_bias", False),
            mlp_bias=fields.switch("mlp_bias", False),
            tied=fields.switch("tie_word_embeddings", False),
            dtype=fields.dtype(),
        )

    @classmethod
    def layer(cls, context: ModelContext, config: LlamaConfig, index: int, cos_sin_PK: Tensor) -> nn.Module:
        """Attention and MLP, either with biases or without."""
        name, hidden_size = f"model.layers.{index}", config.hidden_size
        attention = SelfAttention(
            context,
            f"{name}.self_attn",
            index,
            config.attention[index],
            hidden_size,
            cos_sin_PK,
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
        )
        mlp = GatedMLP(context, f"{name}.mlp", hidden_size, config.intermediate_size, bias=config.mlp_bias)
        return DecoderLayer(context, attention, mlp, hidden_size=hidden_size, norm_eps=config.norm_eps)
