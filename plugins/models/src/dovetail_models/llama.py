"""Llama 2, 3 and later dense models of the same shape.

T: tokens of the step, D: hidden size, S: rows that need logits, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dovetail.contracts.attention import AttentionSpec
from dovetail.contracts.model import Model, ModelContext, ModelFacts, Rename, StepAttention, WeightTable
from dovetail.layers.attention import SelfAttention
from dovetail.layers.decoder import Decoder, DecoderLayer
from dovetail.layers.head import Head
from dovetail.layers.mlp import GatedMLP
from dovetail_models.attention import read_attention
from dovetail_models.fields import Fields
from dovetail_models.rope import Rope, read_rope

RENAMES = (
    Rename("q_proj", "qkv_proj", "q"),
    Rename("k_proj", "qkv_proj", "k"),
    Rename("v_proj", "qkv_proj", "v"),
    Rename("gate_proj", "gate_up_proj", "gate"),
    Rename("up_proj", "gate_up_proj", "up"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaConfig:
    """What config.json says."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    attention: tuple[AttentionSpec, ...]
    rope: Rope
    norm_eps: float
    attention_bias: bool
    mlp_bias: bool
    tied: bool
    dtype: torch.dtype

    @classmethod
    def parse(cls, hf_config: Mapping[str, Any]) -> LlamaConfig:
        """Read it.

        Raises:
            ConfigError: a field has a value that cannot be honoured.
        """
        fields = Fields(hf_config)
        fields.choice("hidden_act", ("silu",), "silu")
        attention = read_attention(fields)
        return cls(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            attention=(attention,) * fields.integer("num_hidden_layers"),
            rope=read_rope(fields, attention.head_size),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            attention_bias=fields.switch("attention_bias", False),
            mlp_bias=fields.switch("mlp_bias", False),
            tied=fields.switch("tie_word_embeddings", False),
            dtype=fields.dtype(),
        )


class Llama(Model):
    """Decoder of pre-norm layers with grouped-query attention and a gated MLP."""

    @classmethod
    def facts(cls, hf_config: Mapping[str, Any]) -> ModelFacts:
        """Every layer has the same attention."""
        config = LlamaConfig.parse(hf_config)
        return ModelFacts(
            attention=config.attention,
            vocab_size=config.vocab_size,
            max_positions=config.rope.max_positions,
            dtype=config.dtype,
        )

    def __init__(self, hf_config: Mapping[str, Any], context: ModelContext) -> None:
        super().__init__(hf_config, context)
        config = LlamaConfig.parse(hf_config)
        cos_sin_PK = config.rope.table(context.max_model_len, context.device)
        layers = [self._layer(context, config, i, cos_sin_PK) for i in range(len(config.attention))]
        self.model = Decoder(
            context, layers, vocab_size=config.vocab_size, hidden_size=config.hidden_size, norm_eps=config.norm_eps
        )
        tied_to = self.model.embed_tokens if config.tied else None
        self.lm_head = Head(context, "lm_head", config.hidden_size, config.vocab_size, tied_to=tied_to)
        self._tied = config.tied

    @staticmethod
    def _layer(context: ModelContext, config: LlamaConfig, index: int, cos_sin_PK: Tensor) -> DecoderLayer:
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

    def weight_table(self) -> WeightTable:
        """Projections that read the same input are merged."""
        tied = {"lm_head.weight": "model.embed_tokens.weight"} if self._tied else {}
        return WeightTable(renames=RENAMES, ignore=("rotary_emb.inv_freq",), tied=tied)

    def forward(self, token_ids_T: Tensor, positions_T: Tensor, attend: StepAttention) -> Tensor:
        """Hidden states ``[T, D]`` after the final norm."""
        return self.model.forward(token_ids_T, positions_T, attend)

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Logits ``[S, V]``."""
        return self.lm_head.forward(hidden_SD)
