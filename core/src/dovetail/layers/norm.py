"""Root-mean-square norm, alone or fused with the residual addition before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from dovetail.contracts.model import ModelContext
from dovetail.contracts.quant import QuantizedRows, RowFormat, TensorSpec
from dovetail.layers.block import Block

AddNorm = Callable[[Tensor, Tensor | None], tuple[Tensor | QuantizedRows, Tensor]]
"""Called as :meth:`RMSNorm.add`; the norm may be quantized."""


class RMSNorm(Block):
    """Scales rows of ``size`` elements to root mean square 1, then by a learned weight.

    Args:
        offset: added to the stored weight. The sum is kept in float32: in a shorter dtype, ``1 + weight`` would lose
            what the weight's own rounding kept.
    """

    def __init__(self, context: ModelContext, size: int, eps: float, *, offset: float = 0.0) -> None:
        dtype = torch.float32 if offset else context.dtype
        super().__init__(context.device, {"weight": TensorSpec(shape=(size,), dtype=dtype)})
        self._eps = eps
        self._offset = offset
        self._ops = context.ops
        self._rms_norm = context.ops.rms_norm
        self._add_rms_norm = context.ops.add_rms_norm
        self._weight_D: Tensor | None = None

    @property
    def learned(self) -> Tensor:
        """The weight ``[D]`` with the offset; there once it is loaded."""
        assert self._weight_D is not None, "the weight is not loaded yet"
        return self._weight_D

    def accept(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep the weight, with the offset."""
        self._weight_D = tensors["weight"] + self._offset if self._offset else tensors["weight"]

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

    def add_for(self, reader: nn.Module) -> AddNorm:
        """:meth:`add`, with the norm quantized if the module that alone reads it takes it so."""
        form = _reads(reader)
        return self.add if form is None else partial(self._add_quantized, form)

    def _add_quantized(self, form: RowFormat, x_TD: Tensor, residual_TD: Tensor | None) -> tuple[QuantizedRows, Tensor]:
        if residual_TD is None:
            return self._ops.quantize_rows(self.forward(x_TD), *form), x_TD
        values_TD, scale_TG, total_TD = self._ops.add_rms_norm_quantize(
            x_TD, residual_TD, self._weight_D, self._eps, *form
        )
        return (values_TD, scale_TG), total_TD


def _reads(module: nn.Module) -> RowFormat | None:
    """``module.reads``, if the class that has its ``forward`` has that too; another's ``forward`` expects a tensor."""
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return cast("RowFormat | None", module.reads) if "reads" in vars(owner) else None
