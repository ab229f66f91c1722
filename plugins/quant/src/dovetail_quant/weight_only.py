"""8-bit weights, quantized on load; activations stay as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.contracts.quant import PackedLinear
from dovetail_quant.experts import Stacked, stack, together
from dovetail_quant.on_load import OnLoad


class WeightOnly(OnLoad):
    """The product is taken in the precision of the activations."""

    def prepare(self, tensors: Mapping[str, Tensor], ops: OpTable, dtype: torch.dtype) -> PackedLinear:
        """Quantize, then let the platform pack."""
        return ops.weight_only_pack(*self.quantize(tensors["weight"], ops))

    def apply(self, x_TI: Tensor, packed: PackedLinear, bias_O: Tensor | None, ops: OpTable) -> Tensor:
        """``x @ (weight × scale)ᵀ + bias``."""
        return ops.weight_only_mm(x_TI, packed, bias_O)

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
        return ops.quantized_experts_mm(x_NI, packed.weight, starts_E1)


class Int8(WeightOnly):
    """``--quantization int8``."""

    dtype = torch.int8


class Fp8WeightOnly(WeightOnly):
    """``--quantization fp8`` on a plain checkpoint."""

    dtype = torch.float8_e4m3fn
