"""The language-model head: hidden states to logits."""

from __future__ import annotations

from dovetail.contracts.model import ModelContext
from dovetail.layers.linear import Linear, Unquantized


class Head(Linear):
    """A linear layer to the vocabulary.

    Args:
        tied: it shares the embedding table, which stays plain whatever the number format of the other layers.
    """

    def __init__(self, context: ModelContext, name: str, hidden_size: int, vocab_size: int, *, tied: bool) -> None:
        super().__init__(context, name, hidden_size, vocab_size, quant=Unquantized() if tied else None)
