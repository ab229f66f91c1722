"""The language-model head: hidden states to logits."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dovetail.contracts.model import ModelContext
from dovetail.layers.embedding import Embedding
from dovetail.layers.linear import Linear, Unquantized
from dovetail.ops import reference

LARGEST_COPY = 64 << 20
"""Bytes of a tied table up to which the embedding keeps it plain beside the head's packed form.

A plain table is read faster, but above this size the second copy would be a notable part of the model's memory.
"""


class Head(Linear):
    """A linear layer to the vocabulary.

    Args:
        tied_to: the embedding whose table it shares unless the checkpoint has a head of its own. A tied head is plain
            whatever the number format of the other layers.
        soft_cap: logits become ``cap × tanh(logits / cap)``, in float32; None leaves them.
    """

    def __init__(
        self,
        context: ModelContext,
        name: str,
        hidden_size: int,
        vocab_size: int,
        *,
        tied_to: Embedding | None = None,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__(context, name, hidden_size, vocab_size, quant=Unquantized() if tied_to is not None else None)
        self._share = tied_to.share if tied_to is not None else None
        self._soft_cap = soft_cap
        self._reads_packed = context.ops.embedding is not reference.embedding

    def accept(self, tensors: Mapping[str, Tensor]) -> None:
        """Pack the weight; a large tied table is then kept in packed form alone, if the platform can embed from it."""
        super().accept(tensors)
        if self._share is not None and self._reads_packed and tensors["weight"].nbytes > LARGEST_COPY:
            self._share(tensors["weight"], self._packed)

    def forward(self, x_SD: Tensor) -> Tensor:
        """Logits ``[S, V]``."""
        logits_SV, cap = super().forward(x_SD), self._soft_cap
        return logits_SV if cap is None else (logits_SV.float() / cap).tanh_().mul_(cap).to(x_SD.dtype)
