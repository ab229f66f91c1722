"""Gemma 3, text: five of six layers slide with rotary positions of their own, and queries and keys are normalised."""

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
from dovetail_models.rope import read_layer_ropes

HEAD_DIM = 256
"""Head size of files that leave it out, and of the attention scale."""
GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4
"""Rotary bases of files that leave them out: of layers that see everything, and of those that slide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gemma3Config(DecoderConfig):
    """What config.json says."""

    intermediate_size: int
    attention_bias: bool


class Gemma3(DecoderModel[Gemma3Config]):
    """Decoder of sandwich layers with grouped-query attention and an MLP gated by gelu."""

    @classmethod
    def parse(cls, hf_config: Mapping[str, Any]) -> Gemma3Config:
        """Norm weights are stored as their distance from 1, and embeddings grow by the root of their size."""
        fields = Fields(hf_config)
        fields.unset("text_config")  # the multimodal model has it
        fields.choice("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
        fields.choice("use_bidirectional_attention", (False,), False)
        fields.unset("attn_logit_softcapping")
        scale = fields.number("query_pre_attn_scalar", HEAD_DIM) ** -0.5
        windows = read_alternating_windows(fields, every=fields.integer("sliding_window_pattern", 6))
        attention = tuple(read_attention(fields, head_dim=HEAD_DIM, window=window, scale=scale) for window in windows)
        full, sliding = read_layer_ropes(fields, attention[0].head_size, full=GLOBAL_THETA, sliding=LOCAL_THETA)
        return Gemma3Config(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            attention=attention,
            ropes=tuple(full if window is None else sliding for window in windows),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            norm_offset=1.0,
            attention_bias=fields.switch("attention_bias", False),
            tied=fields.switch("tie_word_embeddings", True),
            embedding_scale=fields.integer("hidden_size") ** 0.5,
            logit_soft_cap=fields.number_or_null("final_logit_softcapping", None),
            dtype=fields.dtype(),
        )

    @classmethod
    def layer(cls, context: ModelContext, config: Gemma3Config, index: int, cos_sin_PK: Tensor) -> nn.Module:
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
            qk_norm_eps=config.norm_eps,
            norm_offset=config.norm_offset,
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
