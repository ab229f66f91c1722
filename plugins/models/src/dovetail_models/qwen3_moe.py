"""Qwen3 models with experts: as Qwen3, but most layers have a mixture of experts in the place of the MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dovetail.contracts.model import ModelContext, Rename
from dovetail.layers.attention import SelfAttention
from dovetail.layers.decoder import DecoderLayer
from dovetail.layers.mlp import GatedMLP
from dovetail_models.attention import read_attention
from dovetail_models.decoder import MERGED, DecoderConfig, DecoderModel
from dovetail_models.experts import Mixture, read_mixture
from dovetail_models.fields import Fields
from dovetail_models.rope import read_rope


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen3MoeConfig(DecoderConfig):
    """What config.json says.

    Attributes:
        mixtures: per layer, its experts, or None where it has an MLP of ``intermediate_size``.
    """

    intermediate_size: int
    mixtures: tuple[Mixture | None, ...]
    attention_bias: bool


class Qwen3Moe(DecoderModel[Qwen3MoeConfig]):
    """Decoder of pre-norm layers with grouped-query attention, and experts or a gated MLP."""

    renames = (
        Rename("experts.*.gate_proj", "experts.gate_up", "*.gate"),
        Rename("experts.*.up_proj", "experts.gate_up", "*.up"),
        Rename("experts.*.down_proj", "experts.down", "*.down"),
        *MERGED,
    )

    needs = frozenset({"experts"})

    @classmethod
    def parse(cls, hf_config: Mapping[str, Any]) -> Qwen3MoeConfig:
        """Every layer slides, or none does."""
        fields = Fields(hf_config)
        fields.choice("hidden_act", ("silu",), "silu")
        window = fields.integer("sliding_window", 4096) if fields.switch("use_sliding_window", False) else None
        attention = read_attention(fields, window=window)
        mixtures = read_mixtures(fields)
        return Qwen3MoeConfig(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            mixtures=mixtures,
            attention=(attention,) * len(mixtures),
            ropes=(read_rope(fields, attention.head_size),) * len(mixtures),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            attention_bias=fields.switch("attention_bias", False),
            tied=fields.switch("tie_word_embeddings", False),
            dtype=fields.dtype(),
        )

    @classmethod
    def layer(cls, context: ModelContext, config: Qwen3MoeConfig, index: int, cos_sin_PK: Tensor) -> nn.Module:
        """Attention with normalised heads, then experts or the MLP."""
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
        mixture = config.mixtures[index]
        if mixture is None:
            mlp: nn.Module = GatedMLP(context, f"{name}.mlp", hidden_size, config.intermediate_size)
        else:
            mlp = mixture.block(context, f"{name}.mlp", hidden_size)
        return DecoderLayer(context, attention, mlp, hidden_size=hidden_size, norm_eps=config.norm_eps)


def read_mixtures(fields: Fields) -> tuple[Mixture | None, ...]:
    """The experts of each layer: every ``decoder_sparse_step``-th has them, but for ``mlp_only_layers``.

    Raises:
        ConfigError: ``mlp_only_layers`` is no list of layers.
    """
    layers = fields.integer("num_hidden_layers")
    # Newer files say num_local_experts.
    num_experts = fields.integer("num_experts", fields.integer("num_local_experts", 128))
    mixture = read_mixture(
        fields,
        num_experts=num_experts,
        num_active=8,
        inner_size=fields.integer("moe_intermediate_size", 768),
        normalize=fields.switch("norm_topk_prob", False),
    )
    step, dense = fields.integer("decoder_sparse_step", 1), fields.raw("mlp_only_layers") or []
    if not isinstance(dense, list) or not set(dense) <= set(range(layers)):
        raise fields.bad("mlp_only_layers", f"a list of layers, 0 to {layers - 1}")
    return tuple(mixture if (layer + 1) % step == 0 and layer not in dense else None for layer in range(layers))
