"""Llama 2, 3 and later dense models of the same shape.

T: tokens of the step, D: hidden size, S: rows that need logits, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.contracts.attention import AttentionSpec
from dovetail.contracts.model import Model, ModelContext, ModelFacts, Rename, StepAttention, WeightTable
from dovetail.layers.attention import SelfAttention
from dovetail.layers.embedding import Embedding
from dovetail.layers.head import Head
from dovetail.layers.mlp import GatedMLP
from dovetail.layers.norm import RMSNorm
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
    num_layers: int
    attention: AttentionSpec
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
        hidden_size = fields.integer("hidden_size")
        attention = read_attention(fields)
        return cls(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=fields.integer("num_hidden_layers"),
            attention=attention,
            rope=read_rope(fields, attention.head_size),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            attention_bias=fields.switch("attention_bias", False),
            mlp_bias=fields.switch("mlp_bias", False),
            tied=fields.switch("tie_word_embeddings", False),
            dtype=fields.dtype(),
        )


class LlamaLayer(nn.Module):
    """One decoder layer: attention and MLP, each behind a norm, added to the residual stream."""

    def __init__(self, context: ModelContext, name: str, layer: int, config: LlamaConfig, cos_sin_PK: Tensor) -> None:
        super().__init__()
        self.self_attn = SelfAttention(
            context,
            f"{name}.self_attn",
            layer,
            config.attention,
            config.hidden_size,
            cos_sin_PK,
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
        )
        self.mlp = GatedMLP(context, f"{name}.mlp", config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.input_layernorm = RMSNorm(context, config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(context, config.hidden_size, config.norm_eps)
        self._attention, self._mlp = self.self_attn.forward, self.mlp.forward
        self._norm, self._mlp_norm = self.input_layernorm.add, self.post_attention_layernorm.add

    def forward(
        self, x_TD: Tensor, residual_TD: Tensor | None, positions_T: Tensor, attend: StepAttention
    ) -> tuple[Tensor, Tensor]:
        """Output of the layer, not yet added, and the residual stream."""
        x_TD, residual_TD = self._norm(x_TD, residual_TD)
        x_TD, residual_TD = self._mlp_norm(self._attention(x_TD, positions_T, attend), residual_TD)
        return self._mlp(x_TD), residual_TD


class Llama(Model):
    """The whole model."""

    @classmethod
    def facts(cls, hf_config: Mapping[str, Any]) -> ModelFacts:
        """Every layer has the same attention."""
        config = LlamaConfig.parse(hf_config)
        return ModelFacts(
            attention=(config.attention,) * config.num_layers,
            vocab_size=config.vocab_size,
            max_positions=config.rope.max_positions,
            dtype=config.dtype,
        )

    def __init__(self, hf_config: Mapping[str, Any], context: ModelContext) -> None:
        super().__init__(hf_config, context)
        config = LlamaConfig.parse(hf_config)
        cos_sin_PK = config.rope.table(context.max_model_len, context.device)
        embed = Embedding(context, config.vocab_size, config.hidden_size)
        norm = RMSNorm(context, config.hidden_size, config.norm_eps)
        layers = [
            LlamaLayer(context, f"model.layers.{i}", i, config, cos_sin_PK) for i in range(config.num_layers)
        ]
        self.model = nn.ModuleDict({"embed_tokens": embed, "layers": nn.ModuleList(layers), "norm": norm})
        self.lm_head = Head(context, "lm_head", config.hidden_size, config.vocab_size, tied=config.tied)
        self._tied = config.tied
        self._embed, self._norm = embed.forward, norm.add
        self._layers = [layer.forward for layer in layers]

    def weight_table(self) -> WeightTable:
        """Projections that read the same input are merged."""
        tied = {"lm_head.weight": "model.embed_tokens.weight"} if self._tied else {}
        return WeightTable(renames=RENAMES, ignore=("rotary_emb.inv_freq",), tied=tied)

    def forward(self, token_ids_T: Tensor, positions_T: Tensor, attend: StepAttention) -> Tensor:
        """Hidden states ``[T, D]`` after the final norm."""
        x_TD, residual_TD = self._embed(token_ids_T), None
        for layer in self._layers:
            x_TD, residual_TD = layer(x_TD, residual_TD, positions_T, attend)
        return self._norm(x_TD, residual_TD)[0]

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Logits ``[S, V]``."""
        return self.lm_head.forward(hidden_SD)
