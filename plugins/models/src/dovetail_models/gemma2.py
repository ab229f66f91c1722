"""Gemma 2: every other layer slides, scores and logits are soft-capped, and norms stand on both sides of each block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dovetail.contracts.model import ModelContext
from dovetail.layers.attention import SelfAttention
from dovetail.layers.decoder import SandwichLayer
from dovetail.layers.mlp import GatedMLP
from dovetail_models.attention import read_alternating_windows, read_attention
from dovetail_models.decoder import DecoderConfig, DecoderModel
from dovetail_models.fields import Fields
from dovetail_models.rope import read_rope

HEAD_DIM = 256
"""Head size of files that leave it out, and of the attention scale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gemma2Config(DecoderConfig):
    """What config.json says."""

    intermediate_size: int
    attention_bias: bool


class Gemma2(DecoderModel[Gemma2Config]):
    """Decoder of sandwich layers with grouped-query attention and an MLP gated by gelu."""

    @classmethod
    def parse(cls, hf_config: Mapping[str, Any]) -> Gemma2Config:
        """Norm weights are stored as their distance from 1, and embeddings grow by the root of their size."""
        fields = Fields(hf_config)
        fields.choice("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
        fields.choice("use_bidirectional_attention", (False,), False)
        scale = fields.number("query_pre_attn_scalar", HEAD_DIM) ** -0.5
        cap = fields.number_or_null("attn_logit_softcapping", 50.0)
        attention = tuple(
            read_attention(fields, head_dim=HEAD_DIM, window=window, scale=scale, soft_cap=cap)
            for window in read_alternating_windows(fields, every=2)
        )
        return Gemma2Config(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            attention=attention,
            ropes=(read_rope(fields, attention[0].head_size),) * len(attention),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            norm_offset=1.0,
            attention_bias=fields.switch("attention_bias", False),
            tied=fields.switch("tie_word_embeddings", True),
            embedding_scale=fields.integer("hidden_size") ** 0.5,
            logit_soft_cap=fields.number_or_null("final_logit_softcapping", 30.0),
            dtype=fields.dtype(),
        )

    @classmethod
    def layer(cls, context: ModelContext, config: Gemma2Config, index: int, cos_sin_PK: Tensor) -> nn.Module:
        """Sandwiched attention and MLP."""
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
        activation = context.ops.gelu_tanh_and_mul
        mlp = GatedMLP(context, f"{name}.mlp", hidden_size, config.intermediate_size, activation=activation)
        return SandwichLayer(
            context,
            attention,
            mlp,
            hidden_size=hidden_size,
            norm_eps=config.norm_eps,
            norm_offset=config.norm_offset,
        )
