"""Mixtral: Mistral with a mixture of experts in the place of each MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dovetail.contracts.model import ModelContext, Rename
from dovetail.layers.attention import SelfAttention
from dovetail.layers.decoder import DecoderLayer
from dovetail_models.attention import read_attention
from dovetail_models.decoder import MERGED, DecoderConfig, DecoderModel
from dovetail_models.experts import Mixture, read_mixture
from dovetail_models.fields import Fields
from dovetail_models.rope import read_rope

THETA = 1e6
"""Rotary base of files that leave it out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtralConfig(DecoderConfig):
    """What config.json says."""

    mixture: Mixture


class Mixtral(DecoderModel[MixtralConfig]):
    """Decoder of pre-norm layers with grouped-query attention and experts."""

    renames = (
        *MERGED,
        Rename("block_sparse_moe.gate", "mlp.gate"),
        Rename("block_sparse_moe.experts.*.w1", "mlp.experts.gate_up", "*.gate"),
        Rename("block_sparse_moe.experts.*.w3", "mlp.experts.gate_up", "*.up"),
        Rename("block_sparse_moe.experts.*.w2", "mlp.experts.down", "*.down"),
    )

    needs = frozenset({"experts"})

    @classmethod
    def parse(cls, hf_config: Mapping[str, Any]) -> MixtralConfig:
        """Every layer has the same attention; the weights of a token's experts sum to 1."""
        fields = Fields(hf_config)
        fields.choice("hidden_act", ("silu",), "silu")
        layers = fields.integer("num_hidden_layers")
        attention = read_attention(fields, window=fields.integer_or_null("sliding_window", None))
        return MixtralConfig(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            attention=(attention,) * layers,
            ropes=(read_rope(fields, attention.head_size, theta=THETA),) * layers,
            norm_eps=fields.number("rms_norm_eps", 1e-5),
            mixture=read_mixture(
                fields,
                num_experts=fields.integer("num_local_experts", 8),
                num_active=2,
                inner_size=fields.integer("intermediate_size"),
                normalize=True,
            ),
            tied=fields.switch("tie_word_embeddings", False),
            dtype=fields.dtype(),
        )

    @classmethod
    def layer(cls, context: ModelContext, config: MixtralConfig, index: int, cos_sin_PK: Tensor) -> nn.Module:
        """Attention, then experts."""
        name, hidden_size = f"model.layers.{index}", config.hidden_size
        attention = SelfAttention(context, f"{name}.self_attn", index, config.attention[index], hidden_size, cos_sin_PK)
        mlp = config.mixture.block(context, f"{name}.mlp", hidden_size)
        return DecoderLayer(context, attention, mlp, hidden_size=hidden_size, norm_eps=config.norm_eps)
