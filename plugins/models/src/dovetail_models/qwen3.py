"""Qwen3 dense models: each head's queries and keys are normalised; later layers may slide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dovetail.contracts.model import ModelContext
from dovetail.layers.attention import SelfAttention
from dovetail.layers.decoder import DecoderLayer
from dovetail.layers.mlp import GatedMLP
from dovetail_models.attention import read_attention, read_late_windows
from dovetail_models.decoder import DecoderConfig, DecoderModel
from dovetail_models.fields import Fields
from dovetail_models.rope import read_rope

HEAD_DIM = 128
"""Head size of files that leave it out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen3Config(DecoderConfig):
    """What config.json says."""

    intermediate_size: int
    attention_bias: bool


class Qwen3(DecoderModel[Qwen3Config]):
    """Decoder of pre-norm layers with grouped-query attention and a gated MLP."""

    @classmethod
    def parse(cls, hf_config: Mapping[str, Any]) -> Qwen3Config:
        """Layers differ in their window alone."""
        fields = Fields(hf_config)
        fields.choice("hidden_act", ("silu",), "silu")
        windows = read_late_windows(fields)
        attention = tuple(read_attention(fields, head_dim=HEAD_DIM, window=window) for window in windows)
        return Qwen3Config(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            attention=attention,
            ropes=(read_rope(fields, attention[0].head_size),) * len(attention),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            attention_bias=fields.switch("attention_bias", False),
            tied=fields.switch("tie_word_embeddings", False),
            dtype=fields.dtype(),
        )

    @classmethod
    def layer(cls, context: ModelContext, config: Qwen3Config, index: int, cos_sin_PK: Tensor) -> nn.Module:
        """Attention with normalised heads, then the MLP."""
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
            qk_norm_eps=config.norm_eps,
        )
        mlp = GatedMLP(context, f"{name}.mlp", hidden_size, config.intermediate_size)
        return DecoderLayer(context, attention, mlp, hidden_size=hidden_size, norm_eps=config.norm_eps)
