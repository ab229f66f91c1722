"""8-bit weights and activations: weights are quantized on load, activations per token in every step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.contracts.quant import PackedLinear
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


class Int8W8A8(W8A8):
    """``--quantization int8-w8a8``."""

    dtype = torch.int8


class Fp8W8A8(W8A8):
    """``--quantization fp8-w8a8``."""

    dtype = torch.float8_e4m3fn
