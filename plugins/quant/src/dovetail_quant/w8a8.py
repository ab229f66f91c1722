"""8-bit weights and activations: weights are quantized on load, activations per token in every step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.contracts.quant import PackedLinear, RowFormat, RowProduct
from dovetail_quant.experts import Stacked, stack, together
from dovetail_quant.on_load import OnLoad
from dovetail_quant.scaled import Scaled, scaled_product


class W8A8(OnLoad):
    """One scale per output feature, and one per token."""

    def prepare(self, tensors: Mapping[str, Tensor], ops: OpTable, dtype: torch.dtype) -> PackedLinear:
        """Quantize, then let the platform pack."""
        weight_OI, scale_O1 = self.quantize(tensors["weight"], ops)
        return Scaled(ops.scaled_mm_pack(weight_OI), scale_O1)

    def apply(self, x_TI: Tensor, packed: PackedLinear, bias_O: Tensor | None, ops: OpTable) -> Tensor:
        """Quantize each token, multiply, scale, add the bias."""
        return scaled_product(*ops.quantize_rows(x_TI, self.dtype), packed, bias_O, x_TI.dtype, ops)

    def row_product(self) -> RowProduct:
        """What ``apply`` does with quantized tokens."""
        return RowProduct(RowFormat(self.dtype), scaled_product)

    def prepare_experts(
        self, experts: Iterable[Mapping[str, Tensor]], ops: OpTable, dtype: torch.dtype
    ) -> PackedLinear:
        """All together, where the platform multiplies them so."""
        if not together(ops):
            return super().prepare_experts(experts, ops, dtype)
        return stack((self.quantize(tensors["weight"], ops) for tensors in experts), None, ops)

    def apply_experts(self, x_NI: Tensor, packed: PackedLinear, starts_E1: Tensor, ops: OpTable) -> Tensor:
        """See the contract."""
        if not isinstance(packed, Stacked):
            return super().apply_experts(x_NI, packed, starts_E1, ops)
        values_NI, scale_N1 = ops.quantize_rows(x_NI, self.dtype)
        return ops.quantized_experts_mm(values_NI, packed.weight, starts_E1, scale_N1, x_NI.dtype)


class Int8W8A8(W8A8):
    """``--quantization int8-w8a8``."""

    dtype = torch.int8


class Fp8W8A8(W8A8):
    """``--quantization fp8-w8a8``."""

    dtype = torch.float8_e4m3fn
