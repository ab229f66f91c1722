"""Linear layers in any number format, and the plain format itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dovetail.contracts.model import ModelContext
from dovetail.contracts.ops import OpTable
from dovetail.contracts.quant import PackedLinear, QuantizedRows, QuantMethod, RowFormat, TensorSpec
from dovetail.layers.block import Block


class Unquantized(QuantMethod):
    """Plain weights in the activation dtype."""

    @classmethod
    def recognises(cls, quantization_config: Mapping[str, Any]) -> bool:
        """Never: a checkpoint that has a ``quantization_config`` is quantized."""
        return False

    def __init__(self, quantization_config: Mapping[str, Any] | None = None) -> None:
        """There is nothing to configure."""

    def applies_to(self, layer: str) -> bool:
        """Every layer."""
        return True

    def tensors(self, in_features: int, out_features: int, dtype: torch.dtype) -> Mapping[str, TensorSpec]:
        """One ``weight`` ``[O, I]``."""
        return {"weight": TensorSpec(shape=(out_features, in_features), dtype=dtype)}

    def prepare(self, tensors: Mapping[str, Tensor], ops: OpTable, dtype: torch.dtype) -> PackedLinear:
        """The platform's packed form."""
        return ops.linear_pack(tensors["weight"])

    def apply(self, x_TI: Tensor, packed: PackedLinear, bias_O: Tensor | None, ops: OpTable) -> Tensor:
        """``x @ weightᵀ + bias``."""
        return ops.linear(x_TI, packed, bias_O)


class Linear(Block):
    """``x @ weightᵀ + bias``.

    Args:
        context: what the model is built with.
        name: dotted name of the layer in the model, by which the number format decides whether it applies.
        in_features, out_features: sizes.
        bias: whether the checkpoint has a bias.
        quant: the number format, if not the context's.

    Attributes:
        quant: the number format of this layer.
        reads: in which format it takes rows that are quantized already; None takes wide ones alone.
    """

    def __init__(
        self,
        context: ModelContext,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        outputs: Mapping[str, int] | None = None,
        quant: QuantMethod | None = None,
    ) -> None:
        quant = quant or context.quant
        self_quant = quant if quant.applies_to(name) else Unquantized()
        specs = dict(self_quant.tensors(in_features, out_features, context.dtype))
        if bias:
            specs["bias"] = TensorSpec(shape=(out_features,), dtype=context.dtype)
        super().__init__(context.device, specs, outputs)
        self.quant = self_quant
        self._apply_quant = self_quant.apply
        product = self_quant.row_product()
        self.reads: RowFormat | None = None if product is None else product.format
        self._apply_quantized = None if product is None else product.apply
        self._ops = context.ops
        self._dtype = context.dtype
        self._bias_O: Tensor | None = None
        self._packed: PackedLinear = None
        self._is_plain = type(self_quant) is Unquantized

    def accept(self, tensors: Mapping[str, Tensor]) -> None:
        """Pack the weights; the caller frees the loaded form."""
        weights = {suffix: tensor for suffix, tensor in tensors.items() if suffix != "bias"}
        self._bias_O = tensors.get("bias")
        self._packed = self.quant.prepare(weights, self._ops, self._dtype)

    def forward(self, x_TI: Tensor) -> Tensor:
        """``[T, I]`` to ``[T, O]``."""
        return self._apply_quant(x_TI, self._packed, self._bias_O, self._ops)

    def forward_rows(self, x_TI: Tensor | QuantizedRows) -> Tensor:
        """:meth:`forward`, of rows that are wide, or quantized as the layer ``reads`` them."""
        if isinstance(x_TI, Tensor):
            return self.forward(x_TI)
        assert self._apply_quantized is not None, "the layer takes wide rows alone"
        return self._apply_quantized(*x_TI, self._packed, self._bias_O, self._dtype, self._ops)

    def silu_and_mul(self, x_TI: Tensor | QuantizedRows) -> Tensor:
        """``ops.silu_and_mul`` of the outputs, ``[T, O / 2]``; of a plain weight in one operation."""
        if self._is_plain:
            return self._ops.linear_silu_and_mul(x_TI, self._packed, self._bias_O)
        return self._ops.silu_and_mul(self.forward_rows(x_TI))

    def silu_and_mul_for(self, reader: Linear) -> Callable[[Tensor | QuantizedRows], Tensor | QuantizedRows]:
        """:meth:`silu_and_mul`, quantized if the layer that reads it takes it so."""
        form, forward, quantized = reader.reads, self.forward_rows, self._ops.silu_and_mul_quantize
        if form is None or self._is_plain:
            return self.silu_and_mul
        return lambda x_TI: quantized(forward(x_TI), *form)


class MergedLinear(Linear):
    """Several layers of the checkpoint that read the same input, computed as one.

    Args:
        outputs: output features of each part, in order, e.g. ``{"gate": f, "up": f}``. The names are the shards of the
            model's rename table.
    """

    def __init__(
        self, context: ModelContext, name: str, in_features: int, outputs: Mapping[str, int], *, bias: bool = False
    ) -> None:
        super().__init__(context, name, in_features, sum(outputs.values()), bias=bias, outputs=outputs)
