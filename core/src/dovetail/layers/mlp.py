"""Gated feed-forward block."""

from __future__ import annotations

from torch import Tensor, nn

from dovetail.contracts.model import ModelContext
from dovetail.layers.linear import Linear, MergedLinear


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) × up(x))`` (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(
        self, context: ModelContext, name: str, hidden_size: int, inner_size: int, *, bias: bool = False
    ) -> None:
        super().__init__()
        gate_up = {"gate": inner_size, "up": inner_size}
        self.gate_up_proj = MergedLinear(context, f"{name}.gate_up_proj", hidden_size, gate_up, bias=bias)
        self.down_proj = Linear(context, f"{name}.down_proj", inner_size, hidden_size, bias=bias)
        self._gate_up = self.gate_up_proj.forward
        self._down = self.down_proj.forward
        self._silu_and_mul = context.ops.silu_and_mul

    def forward(self, x_TD: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, D]``."""
        return self._down(self._silu_and_mul(self._gate_up(x_TD)))
