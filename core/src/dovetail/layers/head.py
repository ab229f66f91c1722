"""The language-model head: hidden states to logits."""

from __future__ import annotations

from dataclasses import replace

from dovetail.contracts.model import ModelContext
from dovetail.contracts.ops import OpTable
from dovetail.layers.linear import Linear, Unquantized

LARGEST_COPY = 64 << 20
"""Bytes of a tied table up to which the head keeps its own packed copy.

Packing speeds a head up by a tenth to a half, but the embedding reads the plain table, so it costs the table's size
again. Beyond this size the copy would be a notable part of the model's memory.
"""


class Head(Linear):
    """A linear layer to the vocabulary.

    Args:
        tied: it shares the embedding table, which stays plain whatever the number format of the other layers.
    """

    def __init__(self, context: ModelContext, name: str, hidden_size: int, vocab_size: int, *, tied: bool) -> None:
        if tied and hidden_size * vocab_size * context.dtype.itemsize > LARGEST_COPY:
            context = replace(context, ops=OpTable())  # the reference operations read the table as it is
        super().__init__(context, name, hidden_size, vocab_size, quant=Unquantized() if tied else None)
