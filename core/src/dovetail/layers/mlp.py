"""Feed-forward blocks: one gated block for every token, or a few of many."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dovetail.contracts.model import ModelContext
from dovetail.contracts.quant import QuantizedRows, RowFormat
from dovetail.layers.experts import Experts
from dovetail.layers.linear import Linear, MergedLinear
from dovetail.layers.router import Router


class GatedMLP(nn.Module):
    """``down(activation(gate(x)) × up(x))`` (Shazeer 2020, arXiv:2002.05202).

    Args:
        activation: an operation on gate and up side by side; ``silu_and_mul`` if not given.
    """

    def __init__(
        self,
        context: ModelContext,
        name: str,
        hidden_size: int,
        inner_size: int,
        *,
        bias: bool = False,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        gate_up = {"gate": inner_size, "up": inner_size}
        self.gate_up_proj = MergedLinear(context, f"{name}.gate_up_proj", hidden_size, gate_up, bias=bias)
        self.down_proj = Linear(context, f"{name}.down_proj", inner_size, hidden_size, bias=bias)
        self._gated = _gated(self.gate_up_proj, activation, self.down_proj)
        self._down = self.down_proj.forward_rows

    @property
    def reads(self) -> RowFormat | None:
        """The format in which it takes its input, if not wide."""
        return self.gate_up_proj.reads

    def forward(self, x_TD: Tensor | QuantizedRows) -> Tensor:
        """``[T, D]`` to ``[T, D]``."""
        return self._down(self._gated(x_TD))


def _gated(
    gate_up: Linear, activation: Callable[[Tensor], Tensor] | None, down: Linear
) -> Callable[[Tensor | QuantizedRows], Tensor | QuantizedRows]:
    if activation is None:
        return gate_up.silu_and_mul_for(down)
    forward = gate_up.forward_rows
    return lambda x_TD: activation(forward(x_TD))


class RoutedMLP(nn.Module):
    """A router, and experts of which it chooses a few per token.

    Args:
        num_experts, num_active, normalize: see :class:`dovetail.layers.router.Router`.
    """

    def __init__(
        self,
        context: ModelContext,
        name: str,
        hidden_size: int,
        inner_size: int,
        *,
        num_experts: int,
        num_active: int,
        normalize: bool,
    ) -> None:
        super().__init__()
        self.gate = Router(
            context,
            f"{name}.gate",
            hidden_size,
            num_experts=num_experts,
            num_active=num_active,
            normalize=normalize,
        )
        self.experts = Experts(context, f"{name}.experts", num_experts, hidden_size, inner_size)
        self._route, self._experts = self.gate.route, self.experts.forward

    def forward(self, x_TD: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, D]``."""
        return self._experts(x_TD, *self._route(x_TD))
