"""Token embedding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dovetail.contracts.model import ModelContext
from dovetail.contracts.ops import PackedWeight
from dovetail.contracts.quant import TensorSpec
from dovetail.layers.block import Block


class Embedding(Block):
    """A table ``[V, D]``, one row per token of the vocabulary.

    Args:
        scale: factor on the rows, rounded to the dtype of the activations.
    """

    def __init__(self, context: ModelContext, vocab_size: int, hidden_size: int, *, scale: float = 1.0) -> None:
        super().__init__(context.device, {"weight": TensorSpec(shape=(vocab_size, hidden_size), dtype=context.dtype)})
        self._embedding = context.ops.embedding
        self._scale = torch.tensor(scale).to(context.dtype).item()
        self._table_VD: Tensor | PackedWeight = None

    def accept(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep the table as it is: rows are read from it directly."""
        self._table_VD = tensors["weight"]

    def share(self, table_VD: Tensor, packed: PackedWeight) -> None:
        """Read rows from the packed form of ``table_VD``, if that is this embedding's table."""
        if self._table_VD is table_VD:
            self._table_VD = packed

    def forward(self, token_ids_T: Tensor) -> Tensor:
        """Rows ``[T, D]`` of the table."""
        rows_TD = self._embedding(token_ids_T, self._table_VD)
        return rows_TD if self._scale == 1 else rows_TD * self._scale
