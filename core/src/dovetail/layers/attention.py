"""Self-attention around the engine's paged cache."""

from __future__ import annotations

from torch import Tensor, nn

from dovetail.contracts.attention import AttentionSpec, Preparation
from dovetail.contracts.model import ModelContext, StepAttention
from dovetail.contracts.quant import QuantizedRows, RowFormat
from dovetail.layers.linear import Linear, MergedLinear
from dovetail.layers.norm import RMSNorm


def wanted(x_TD: Tensor, attend: StepAttention) -> Tensor:
    """The rows that matter: all of them, but in a model's last layer."""
    rows_S: Tensor | None = getattr(attend, "rows_S", None)  # a plain function has none
    return x_TD if rows_S is None else x_TD[rows_S]


class SelfAttention(nn.Module):
    """Projections, optional norms of queries and keys, rotary positions, attention, output projection.

    Args:
        context: what the model is built with.
        name: dotted name of this module in the model.
        layer: index of the layer, which selects its cache.
        spec: heads and head size.
        hidden_size: of the model.
        cos_sin_PK: the rotary table.
        qkv_bias, output_bias: which projections have a bias.
        qk_norm_eps: normalise each head's queries and keys before the rotation, with this eps; None does not.
        norm_offset: of these norms.

    Attributes:
        narrows: it returns the rows alone that :func:`wanted` keeps.
        spec: heads and head size.
    """

    narrows = True

    def __init__(
        self,
        context: ModelContext,
        name: str,
        layer: int,
        spec: AttentionSpec,
        hidden_size: int,
        cos_sin_PK: Tensor,
        *,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm_eps: float | None = None,
        norm_offset: float = 0.0,
    ) -> None:
        super().__init__()
        heads, kv_heads, size = spec.num_heads, spec.num_kv_heads, spec.head_size
        qkv = {"q": heads * size, "k": kv_heads * size, "v": kv_heads * size}
        self.qkv_proj = MergedLinear(context, f"{name}.qkv_proj", hidden_size, qkv, bias=qkv_bias)
        self.o_proj = Linear(context, f"{name}.o_proj", heads * size, hidden_size, bias=output_bias)
        if qk_norm_eps is not None:
            self.q_norm = RMSNorm(context, size, qk_norm_eps, offset=norm_offset)
            self.k_norm = RMSNorm(context, size, qk_norm_eps, offset=norm_offset)
        self._layer = layer
        self.spec = spec
        self._cos_sin_PK = cos_sin_PK
        self._qk_norm_eps = qk_norm_eps
        self._ops = context.ops
        self._preparation: Preparation | None = None
        self._qkv = self.qkv_proj.forward_rows
        self._output = self.o_proj.forward

    @property
    def reads(self) -> RowFormat | None:
        """The format in which it takes its input, if not wide."""
        return self.qkv_proj.reads

    def forward(self, x_TD: Tensor | QuantizedRows, positions_T: Tensor, attend: StepAttention) -> Tensor:
        """``[T, D]`` to ``[T, D]``, or to ``[S, D]`` where only ``attend.rows_S`` matter."""
        preparation = self._preparation or self._prepare()
        qkv_TE = self._qkv(x_TD)
        projected = getattr(attend, "projected", None)  # a plain function has none
        if projected is None:
            return self._output(attend(self._layer, *preparation.heads(qkv_TE, positions_T, self.spec)))
        return self._output(wanted(projected(self._layer, qkv_TE, positions_T, preparation), attend))

    def _prepare(self) -> Preparation:
        """Made in the first step, when the weights are there."""
        weights = None if self._qk_norm_eps is None else (self.q_norm.learned, self.k_norm.learned)
        self._preparation = Preparation(
            cos_sin_PK=self._cos_sin_PK, norm_weights_K=weights, eps=self._qk_norm_eps or 0.0, ops=self._ops
        )
        return self._preparation
