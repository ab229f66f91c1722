"""The model family: grouped-query attention and a gated MLP, under names of its own."""

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


class Fossil(Model):
    """Every layer has the same attention."""

    @classmethod
    def facts(cls, hf_config: Mapping[str, Any]) -> ModelFacts:
        for field, value in (("use_sliding_window", False), ("hidden_act", "silu")):
            if hf_config.get(field, value) != value:
                raise ConfigError(f"{field} in config.json is {hf_config[field]!r}; Fossil is served with {value!r}.")
        rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
        if rope.get("rope_type", "default") != "default":
            raise ConfigError(f"rope_type in config.json is {rope['rope_type']!r}; Fossil is served with 'default'.")
        dtype = hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32"
        return ModelFacts(
            attention=[attention(hf_config)] * hf_config["num_hidden_layers"],
            vocab_size=hf_config["vocab_size"],
            max_positions=hf_config["max_position_embeddings"],
            dtype=getattr(torch, dtype),
        )

    def __init__(self, hf_config: Mapping[str, Any], context: ModelContext) -> None:
        super().__init__(hf_config, context)
        c, spec = hf_config, attention(hf_config)
        size, eps, bias = c["hidden_size"], c["rms_norm_eps"], c.get("attention_bias", False)
        theta = (c.get("rope_parameters") or c)["rope_theta"]
        angles = rotary_table(frequencies(spec.head_size, theta), context.max_model_len, context.device)
        layers = []
        for i in range(c["num_hidden_layers"]):
            name = f"model.layers.{i}"
            layers.append(
                DecoderLayer(
                    context,
                    SelfAttention(
                        context, f"{name}.self_attn", i, spec, size, angles, qkv_bias=bias, output_bias=bias
                    ),
                    GatedMLP(context, f"{name}.mlp", size, c["intermediate_size"], bias=c.get("mlp_bias", False)),
                    hidden_size=size,
                    norm_eps=eps,
                )
            )
        self.model = Decoder(context, layers, vocab_size=c["vocab_size"], hidden_size=size, norm_eps=eps)
        self._tied = c.get("tie_word_embeddings", True)
        tied_to = self.model.embed_tokens if self._tied else None
        self.lm_head = Head(context, "lm_head", size, c["vocab_size"], tied_to=tied_to)

    def weight_table(self) -> WeightTable:
        tied = {"lm_head.weight": "model.embed_tokens.weight"} if self._tied else {}
        return WeightTable(renames=RENAMES, tied=tied)

    def forward(self, token_ids_T: Tensor, positions_T: Tensor, attend: StepAttention) -> Tensor:
        return self.model(token_ids_T, positions_T, attend)

    def logits(self, hidden_SD: Tensor) -> Tensor:
        return self.lm_head(hidden_SD)


def attention(hf_config: Mapping[str, Any]) -> AttentionSpec:
    """The attention of every layer."""
    heads = hf_config["num_attention_heads"]
    size = hf_config.get("head_dim") or hf_config["hidden_size"] // heads
    return AttentionSpec(
        num_heads=heads, num_kv_heads=hf_config["num_key_value_heads"], head_size=size, scale=size**-0.5
    )
