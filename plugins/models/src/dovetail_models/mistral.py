"""Mistral dense models: every layer sees a sliding window, or none does."""

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

WINDOW = 4096
"""Sliding window of files that leave it out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MistralConfig(DecoderConfig):
    """What config.json says."""

    intermediate_size: int


class Mistral(DecoderModel[MistralConfig]):
    """Decoder of pre-norm layers with grouped-query attention and a gated MLP."""

    @classmethod
    def parse(cls, hf_config: Mapping[str, Any]) -> MistralConfig:
        """Every layer has the same attention."""
        fields = Fields(hf_config)
        fields.choice("hidden_act", ("silu",), "silu")
        layers = fields.integer("num_hidden_layers")
        attention = read_attention(fields, window=fields.integer_or_null("sliding_window", WINDOW))
        return MistralConfig(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            attention=(attention,) * layers,
            ropes=(read_rope(fields, attention.head_size),) * layers,
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            tied=fields.switch("tie_word_embeddings", False),
            dtype=fields.dtype(),
        )

    @classmethod
    def layer(cls, context: ModelContext, config: MistralConfig, index: int, cos_sin_PK: Tensor) -> nn.Module:
        """Nothing has a bias."""
        name, hidden_size = f"model.layers.{index}", config.hidden_size
        attention = SelfAttention(context, f"{name}.self_attn", index, config.attention[index], hidden_size, cos_sin_PK)
        mlp = GatedMLP(context, f"{name}.mlp", hidden_size, config.intermediate_size)
        return DecoderLayer(context, attention, mlp, hidden_size=hidden_size, norm_eps=config.norm_eps)
