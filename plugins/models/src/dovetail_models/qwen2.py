"""Qwen2 and Qwen2.5 dense models: queries, keys and values have biases; later layers may slide."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen2Config(DecoderConfig):
    """What config.json says."""

    intermediate_size: int


class Qwen2(DecoderModel[Qwen2Config]):
    """Decoder of pre-norm layers with grouped-query attention and a gated MLP."""

    @classmethod
    def parse(cls, hf_config: Mapping[str, Any]) -> Qwen2Config:
        """Layers differ in their window alone."""
        fields = Fields(hf_config)
        fields.choice("hidden_act", ("silu",), "silu")
        attention = tuple(read_attention(fields, window=window) for window in read_late_windows(fields))
        return Qwen2Config(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            attention=attention,
            ropes=(read_rope(fields, attention[0].head_size),) * len(attention),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            tied=fields.switch("tie_word_embeddings", False),
            dtype=fields.dtype(),
        )

    @classmethod
    def layer(cls, context: ModelContext, config: Qwen2Config, index: int, cos_sin_PK: Tensor) -> nn.Module:
        """Biases on queries, keys and values alone."""
        name, hidden_size = f"model.layers.{index}", config.hidden_size
        attention = SelfAttention(
            context,
            f"{name}.self_attn",
            index,
            config.attention[index],
            hidden_size,
            cos_sin_PK,
            qkv_bias=True,
        )
        mlp = GatedMLP(context, f"{name}.mlp", hidden_size, config.intermediate_size)
        return DecoderLayer(context, attention, mlp, hidden_size=hidden_size, norm_eps=config.norm_eps)
