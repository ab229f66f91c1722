"""The usual decoder: an embedding, layers around a residual stream, a final norm."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dovetail.contracts.model import ModelContext, StepAttention
from dovetail.layers.attention import wanted
from dovetail.layers.embedding import Embedding
from dovetail.layers.norm import RMSNorm


class DecoderLayer(nn.Module):
    """Attention, then feed-forward, each behind a norm and added to the residual stream.

    Args:
        context: what the model is built with.
        attention: called with ``(x_TD, positions_T, attend)``.
        mlp: called with ``(x_TD,)``.
        hidden_size, norm_eps: of the norms.

    Attributes:
        narrows: as a model's last layer, it goes on with the rows that matter alone, since its attention does.
    """

    def __init__(
        self, context: ModelContext, attention: nn.Module, mlp: nn.Module, *, hidden_size: int, norm_eps: float
    ) -> None:
        super().__init__()
        self.narrows = getattr(attention, "narrows", False)
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = RMSNorm(context, hidden_size, norm_eps)
        self.post_attention_layernorm = RMSNorm(context, hidden_size, norm_eps)
        self._attention, self._mlp = attention.forward, mlp.forward
        self._attention_norm = self.input_layernorm.add_for(attention)
        self._mlp_norm = self.post_attention_layernorm.add_for(mlp)

    def forward(
        self, x_TD: Tensor, residual_TD: Tensor | None, positions_T: Tensor, attend: StepAttention
    ) -> tuple[Tensor, Tensor]:
        """Take the output of the layer before and the stream without it; return the same for the layer after."""
        normed_TD, residual_TD = self._attention_norm(x_TD, residual_TD)
        attended_TD = self._attention(normed_TD, positions_T, attend)
        normed_TD, residual_TD = self._mlp_norm(attended_TD, wanted(residual_TD, attend))
        return self._mlp(normed_TD), residual_TD


class SandwichLayer(nn.Module):
    """Attention, then feed-forward, each between two norms and added to the residual stream.

    Args:
        context, attention, mlp, hidden_size, norm_eps: as of :class:`DecoderLayer`.
        norm_offset: of the norms.

    Attributes:
        narrows: as of :class:`DecoderLayer`.
    """

    def __init__(
        self,
        context: ModelContext,
        attention: nn.Module,
        mlp: nn.Module,
        *,
        hidden_size: int,
        norm_eps: float,
        norm_offset: float = 0.0,
    ) -> None:
        super().__init__()
        self.narrows = getattr(attention, "narrows", False)
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = RMSNorm(context, hidden_size, norm_eps, offset=norm_offset)
        self.post_attention_layernorm = RMSNorm(context, hidden_size, norm_eps, offset=norm_offset)
        self.pre_feedforward_layernorm = RMSNorm(context, hidden_size, norm_eps, offset=norm_offset)
        self.post_feedforward_layernorm = RMSNorm(context, hidden_size, norm_eps, offset=norm_offset)
        self._attention, self._mlp = attention.forward, mlp.forward
        self._before_attention = self.input_layernorm.add_for(attention)
        self._after_attention = self.post_attention_layernorm.forward
        self._before_mlp = self.pre_feedforward_layernorm.add_for(mlp)
        self._after_mlp = self.post_feedforward_layernorm.forward

    def forward(
        self, x_TD: Tensor, residual_TD: Tensor | None, positions_T: Tensor, attend: StepAttention
    ) -> tuple[Tensor, Tensor]:
        """Take the output of the layer before and the stream without it; return the same for the layer after."""
        normed_TD, residual_TD = self._before_attention(x_TD, residual_TD)
        x_TD = self._after_attention(self._attention(normed_TD, positions_T, attend))
        normed_TD, residual_TD = self._before_mlp(x_TD, wanted(residual_TD, attend))
        return self._after_mlp(self._mlp(normed_TD)), residual_TD


class Decoder(nn.Module):
    """Tokens to hidden states.

    Args:
        context: what the model is built with.
        layers: in order; called as :class:`DecoderLayer` is.
        vocab_size, hidden_size, norm_eps, norm_offset: of the embedding and the final norm.
        embedding_scale: factor on the embedding's rows.
    """

    def __init__(
        self,
        context: ModelContext,
        layers: Sequence[nn.Module],
        *,
        vocab_size: int,
        hidden_size: int,
        norm_eps: float,
        norm_offset: float = 0.0,
        embedding_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(context, vocab_size, hidden_size, scale=embedding_scale)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(context, hidden_size, norm_eps, offset=norm_offset)
        self._embed, self._norm = self.embed_tokens.forward, self.norm.add
        self._layers = [layer.forward for layer in layers]
        self._narrows = getattr(layers[-1], "narrows", False)

    def forward(self, token_ids_T: Tensor, positions_T: Tensor, attend: StepAttention) -> Tensor:
        """Hidden states after the final norm: ``[T, D]``, or ``[S, D]`` where only so many rows matter."""
        x_TD, residual_TD = self._embed(token_ids_T), None
        for layer in self._layers[:-1]:
            x_TD, residual_TD = layer(x_TD, residual_TD, positions_T, attend)
        last = getattr(attend, "last", None) if self._narrows else None  # a plain function has none
        x_TD, residual_TD = self._layers[-1](x_TD, residual_TD, positions_T, attend if last is None else last())
        return self._norm(x_TD, residual_TD)[0]
