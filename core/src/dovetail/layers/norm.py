"""Root-mean-square norm, alone or fused with the residual addition before it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dovetail.contracts.model import ModelContext
from dovetail.contracts.quant import TensorSpec
from dovetail.layers.block import Block


class RMSNorm(Block):
    """Scales rows of ``size`` elements to root mean square 1, then by a learned weight."""

    def __init__(self, context: ModelContext, size: int, eps: float) -> None:
        super().__init__(context.device, {"weight": TensorSpec(shape=(size,), dtype=context.dtype)})
        self._eps = eps
        self._rms_norm = context.ops.rms_norm
        self._add_rms_norm = context.ops.add_rms_norm
        self._weight_D: Tensor | None = None

    def accept(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep the weight as it is."""
        self._weight_D = tensors["weight"]

    def forward(self, x_TD: Tensor) -> Tensor:
        """The norm of ``x`` ``[..., D]``."""
        return self._rms_norm(x_TD, self._weight_D, self._eps)

    def add(self, x_TD: Tensor, residual_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        """Add ``x`` to the residual stream; returns the norm of the sum, and the sum.

        Without a residual the stream begins with ``x``.
        """
        if residual_TD is None:
            return self._rms_norm(x_TD, self._weight_D, self._eps), x_TD
        return self._add_rms_norm(x_TD, residual_TD, self._weight_D, self._eps)
