"""int8 weights, dequantized as they are multiplied."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.contracts.quant import PackedLinear, QuantMethod, TensorSpec
from dovetail.errors import ConfigError


def quantize(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """int8 ``[O, I]`` and float32 scales ``[O, 1]``."""
    scale_O1 = weight_OI.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (weight_OI.float() / scale_O1).round().to(torch.int8), scale_O1


class SketchMethod(QuantMethod):
    """Weight ``[o, i]`` is ``weight[o, i] × weight_scale[o]``."""

    @classmethod
    def recognises(cls, quantization_config: Mapping[str, Any]) -> bool:
        return quantization_config.get("quant_method") == "sketch"

    def __init__(self, quantization_config: Mapping[str, Any] | None) -> None:
        bits = (quantization_config or {}).get("bits", 8)
        if bits != 8:
            raise ConfigError(f"quantization_config has bits {bits}; sketch reads 8.")
        self._on_load = quantization_config is None

    def applies_to(self, layer: str) -> bool:
        return layer != "lm_head"

    def tensors(self, in_features: int, out_features: int, dtype: torch.dtype) -> Mapping[str, TensorSpec]:
        if self._on_load:
            return {"weight": TensorSpec(shape=(out_features, in_features), dtype=dtype)}
        return {
            "weight": TensorSpec(shape=(out_features, in_features), dtype=torch.int8),
            "weight_scale": TensorSpec(shape=(out_features, 1), dtype=torch.float32),
        }

    def prepare(self, tensors: Mapping[str, Tensor], ops: OpTable, dtype: torch.dtype) -> PackedLinear:
        if self._on_load:
            weight_OI, scale_O1 = quantize(tensors["weight"])
        else:
            weight_OI, scale_O1 = tensors["weight"], tensors["weight_scale"]
        return weight_OI, scale_O1.to(dtype)

    def apply(self, x_TI: Tensor, packed: PackedLinear, bias_O: Tensor | None, ops: OpTable) -> Tensor:
        weight_OI, scale_O1 = packed
        return F.linear(x_TI, weight_OI.to(x_TI.dtype) * scale_O1, bias_O)
