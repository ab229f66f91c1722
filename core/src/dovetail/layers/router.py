"""Router: which experts compute a token, and how much each counts."""

from __future__ import annotations

from torch import Tensor

from dovetail.contracts.model import ModelContext
from dovetail.layers.linear import Linear, Unquantized


class Router(Linear):
    """A linear layer whose outputs are the experts' logits; see :func:`dovetail.ops.reference.choose_experts`.

    Its weight is plain whatever the number format of the experts: it is small, and rounding it changes the choice.

    Args:
        num_experts: to choose from.
        num_active: experts per token.
        normalize: whether the chosen experts' probabilities are scaled to sum to 1.
    """

    def __init__(
        self,
        context: ModelContext,
        name: str,
        hidden_size: int,
        *,
        num_experts: int,
        num_active: int,
        normalize: bool,
    ) -> None:
        super().__init__(context, name, hidden_size, num_experts, quant=Unquantized())
        self._choose = context.ops.choose_experts
        self._num_active = num_active
        self._normalize = normalize

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The experts ``[T, A]`` of each token, and their float32 weights ``[T, A]``."""
        return self._choose(self.forward(x_TD), self._num_active, self._normalize)
