"""8-bit weights, quantized on load; activations stay as they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.contracts.quant import PackedLinear
from dovetail_quant.on_load import OnLoad


class WeightOnly(OnLoad):
    """The product is taken in the precision of the activations."""

    def prepare(self, tensors: Mapping[str, Tensor], ops: OpTable, dtype: torch.dtype) -> PackedLinear:
        """Quantize, then let the platform pack."""
        return ops.weight_only_pack(*self.quantize(tensors["weight"], ops))

    def apply(self, x_TI: Tensor, packed: PackedLinear, bias_O: Tensor | None, ops: OpTable) -> Tensor:
        """``x @ (weight × scale)ᵀ + bias``."""
        return ops.weight_only_mm(x_TI, packed, bias_O)


class Int8(WeightOnly):
    """``--quantization int8``."""

    dtype = torch.int8


class Fp8WeightOnly(WeightOnly):
    """``--quantization fp8`` on a plain checkpoint."""

    dtype = torch.float8_e4m3fn
