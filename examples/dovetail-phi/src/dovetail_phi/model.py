"""Phi: attention and feed-forward side by side, behind one LayerNorm; biases everywhere; partial rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dovetail.contracts.model import Model, ModelContext, ModelFacts, Rename, StepAttention, WeightTable
from dovetail.contracts.quant import TensorSpec
from dovetail.layers.attention import SelfAttention
from dovetail.layers.block import Block
from dovetail.layers.embedding import Embedding
from dovetail.layers.linear import Linear
from dovetail.layers.rotary import frequencies, rotary_table
from dovetail_phi.config import PhiConfig

RENAMES = (
    Rename("q_proj", "qkv_proj", "q"),
    Rename("k_proj", "qkv_proj", "k"),
    Rename("v_proj", "qkv_proj", "v"),
    Rename("self_attn.dense", "self_attn.o_proj"),
)


class LayerNorm(Block):
    """Mean 0 and variance 1 for each row, then a learned scale and shift (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, context: ModelContext, size: int, eps: float) -> None:
        spec = TensorSpec(shape=(size,), dtype=context.dtype)
        super().__init__(context.device, {"weight": spec, "bias": spec})
        self._eps = eps

    def accept(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep both as they are."""
        self._weight_D, self._bias_D = tensors["weight"], tensors["bias"]

    def forward(self, x_TD: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, D]``."""
        return F.layer_norm(x_TD, self._weight_D.shape, self._weight_D, self._bias_D, self._eps)


class MLP(nn.Module):
    """``fc2(gelu(fc1(x)))``."""

    def __init__(self, context: ModelContext, name: str, config: PhiConfig) -> None:
        super().__init__()
        self.fc1 = Linear(context, f"{name}.fc1", config.hidden_size, config.inner_size, bias=True)
        self.fc2 = Linear(context, f"{name}.fc2", config.inner_size, config.hidden_size, bias=True)

    def forward(self, x_TD: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, D]``."""
        out_TD: Tensor = self.fc2(F.gelu(self.fc1(x_TD), approximate="tanh"))
        return out_TD


class Layer(nn.Module):
    """``x + attention(norm(x)) + mlp(norm(x))``, with one norm for both."""

    def __init__(self, context: ModelContext, index: int, config: PhiConfig, cos_sin_PK: Tensor) -> None:
        super().__init__()
        name = f"model.layers.{index}"
        self.input_layernorm = LayerNorm(context, config.hidden_size, config.norm_eps)
        self.self_attn = SelfAttention(
            context,
            f"{name}.self_attn",
            index,
            config.attention,
            config.hidden_size,
            cos_sin_PK,
            qkv_bias=True,
            output_bias=True,
        )
        self.mlp = MLP(context, f"{name}.mlp", config)

    def forward(self, x_TD: Tensor, positions_T: Tensor, attend: StepAttention) -> Tensor:
        """``[T, D]`` to ``[T, D]``."""
        normed_TD = self.input_layernorm(x_TD)
        out_TD: Tensor = x_TD + self.self_attn(normed_TD, positions_T, attend) + self.mlp(normed_TD)
        return out_TD


class Body(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, context: ModelContext, config: PhiConfig) -> None:
        super().__init__()
        inverse_K = frequencies(config.rotary_dim, config.rope_theta)
        cos_sin_PK = rotary_table(inverse_K, context.max_model_len, context.device)
        self.embed_tokens = Embedding(context, config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(context, i, config, cos_sin_PK) for i in range(config.num_layers)])
        self.final_layernorm = LayerNorm(context, config.hidden_size, config.norm_eps)

    def forward(self, token_ids_T: Tensor, positions_T: Tensor, attend: StepAttention) -> Tensor:
        """Hidden states ``[T, D]``."""
        x_TD = self.embed_tokens(token_ids_T)
        for layer in self.layers:
            x_TD = layer(x_TD, positions_T, attend)
        normed_TD: Tensor = self.final_layernorm(x_TD)
        return normed_TD


class Phi(Model):
    """The whole family: its members differ in size alone."""

    @classmethod
    def facts(cls, hf_config: Mapping[str, Any]) -> ModelFacts:
        """See :class:`dovetail_phi.config.PhiConfig` for what is refused."""
        config = PhiConfig.read(hf_config)
        return ModelFacts(
            attention=[config.attention] * config.num_layers,
            vocab_size=config.vocab_size,
            max_positions=config.max_positions,
            dtype=config.dtype,
        )

    def __init__(self, hf_config: Mapping[str, Any], context: ModelContext) -> None:
        super().__init__(hf_config, context)
        config = PhiConfig.read(hf_config)
        self.model = Body(context, config)
        self.lm_head = Linear(context, "lm_head", config.hidden_size, config.vocab_size, bias=True)

    def weight_table(self) -> WeightTable:
        """Names of transformers' checkpoints."""
        return WeightTable(renames=RENAMES)

    def forward(self, token_ids_T: Tensor, positions_T: Tensor, attend: StepAttention) -> Tensor:
        """Hidden states ``[T, D]`` after the final norm."""
        hidden_TD: Tensor = self.model(token_ids_T, positions_T, attend)
        return hidden_TD

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Logits ``[S, V]``: the head has a bias."""
        logits_SV: Tensor = self.lm_head(hidden_SD)
        return logits_SV
