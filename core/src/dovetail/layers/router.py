"""Router: which experts compute a token, and how much each counts."""

from __future__ import annotations

from torch import Tensor

from dovetail.contracts.model import ModelContext
from dovetail.layers.linear import Linear, Unquantized


class Router(Linear):
    """Softmax over the experts, of which each token takes the most probable (Shazeer et al. 2017, arXiv:1701.06538).

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
        self._num_active = num_active
        self._normalize = normalize

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The experts ``[T, A]`` of each token, and their float32 weights ``[T, A]``."""
        probs_TE = self.forward(x_TD).float().softmax(-1)
        weights_TA, ids_TA = probs_TE.topk(self._num_active, dim=-1)
        if self._normalize:
            weights_TA = weights_TA / weights_TA.sum(-1, keepdim=True)
        return ids_TA, weights_TA
