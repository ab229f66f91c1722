"""Weights as a power of two per output and the bits of bfloat16: exact for checkpoints in bfloat16."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.contracts.quant import PackedLinear, QuantMethod, TensorSpec
from dovetail.errors import ConfigError


def quantize(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """int16 ``[O, I]``, the bits of bfloat16 values up to 1, and float32 scales ``[O, 1]``."""
    scale_O1 = torch.exp2(weight_OI.float().abs().amax(1, keepdim=True).clamp(min=1e-30).log2().ceil())
    return (weight_OI.float() / scale_O1).to(torch.bfloat16).view(torch.int16), scale_O1


class FossilFormat(QuantMethod):
    """Weight ``[o, i]`` is ``bfloat16(weight[o, i]) × weight_scale[o]``."""

    @classmethod
    def recognises(cls, quantization_config: Mapping[str, Any]) -> bool:
        return quantization_config.get("quant_method") == "fossil"

    def __init__(self, quantization_config: Mapping[str, Any] | None) -> None:
        bits = (quantization_config or {}).get("bits", 16)
        if bits != 16:
            raise ConfigError(f"quantization_config has bits {bits}; fossil reads 16.")
        self._on_load = quantization_config is None

    def applies_to(self, layer: str) -> bool:
        return layer != "lm_head"

    def tensors(self, in_features: int, out_features: int, dtype: torch.dtype) -> Mapping[str, TensorSpec]:
        if self._on_load:
            return {"weight": TensorSpec(shape=(out_features, in_features), dtype=dtype)}
        return {
            "weight": TensorSpec(shape=(out_features, in_features), dtype=torch.int16),
            "weight_scale": TensorSpec(shape=(out_features, 1), dtype=torch.float32),
        }

    def prepare(self, tensors: Mapping[str, Tensor], ops: OpTable, dtype: torch.dtype) -> PackedLinear:
        if self._on_load:
            return quantize(tensors["weight"])
        return tensors["weight"], tensors["weight_scale"]

    def apply(self, x_TI: Tensor, packed: PackedLinear, bias_O: Tensor | None, ops: OpTable) -> Tensor:
        bits_OI, scale_O1 = packed
        weight_OI = (bits_OI.view(torch.bfloat16).float() * scale_O1).to(x_TI.dtype)
        return F.linear(x_TI, weight_OI, bias_O)
