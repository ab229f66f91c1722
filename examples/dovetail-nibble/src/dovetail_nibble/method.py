"""4-bit weights, multiplied by the platform's own operation for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.contracts.quant import PackedLinear, QuantMethod, TensorSpec
from dovetail.errors import ConfigError
from dovetail_nibble.packing import quantize

GROUP_SIZE = 32
"""Of weights that are quantized on load; rows that it does not divide use its largest divisor that fits."""


@dataclass(frozen=True, slots=True)
class NibbleWeight:
    """What ``w4a16_mm`` reads of one layer."""

    packed: Tensor
    scales_OG: Tensor
    group_size: int


class Nibble(QuantMethod):
    """Weight ``[o, i]`` is ``(value[o, i] - 8) × scale[o, i // group_size]``."""

    @classmethod
    def recognises(cls, quantization_config: Mapping[str, Any]) -> bool:
        """By the name of the format alone; the constructor looks at the rest."""
        return quantization_config.get("quant_method") == "nibble"

    def __init__(self, quantization_config: Mapping[str, Any] | None) -> None:
        self._on_load = quantization_config is None
        given = quantization_config or {}
        if given.get("bits", 4) != 4:
            raise ConfigError(f"quantization_config has bits {given['bits']!r}; nibble reads 4.")
        self._group_size = given.get("group_size", GROUP_SIZE)
        if type(self._group_size) is not int or self._group_size < 2 or self._group_size % 2:
            raise ConfigError(f"quantization_config has group_size {self._group_size!r}; it must be even and positive.")

    def applies_to(self, layer: str) -> bool:
        """All but the output head, whose errors would go straight into the logits."""
        return layer.split(".")[-1] != "lm_head"

    def tensors(self, in_features: int, out_features: int, dtype: torch.dtype) -> Mapping[str, TensorSpec]:
        """Plain weights if they are quantized on load, else packed ones and scales."""
        group_size = self._group_of(in_features)
        if self._on_load:
            return {"weight": TensorSpec(shape=(out_features, in_features), dtype=dtype)}
        return {
            "weight_packed": TensorSpec(shape=(out_features, in_features // 2), dtype=torch.uint8),
            "weight_scale": TensorSpec(shape=(out_features, in_features // group_size), dtype=torch.float32),
        }

    def prepare(self, tensors: Mapping[str, Tensor], ops: OpTable, dtype: torch.dtype) -> PackedLinear:
        """Quantize, or take what the checkpoint brings."""
        if self._on_load:
            weight_OI = tensors["weight"]
            group_size = self._group_of(weight_OI.shape[1])
            packed, scales_OG = quantize(weight_OI, group_size)
        else:
            packed, scales_OG = tensors["weight_packed"], tensors["weight_scale"]
            group_size = 2 * packed.shape[1] // scales_OG.shape[1]
        return NibbleWeight(packed, scales_OG, group_size)

    def apply(self, x_TI: Tensor, packed: PackedLinear, bias_O: Tensor | None, ops: OpTable) -> Tensor:
        """``x @ weightᵀ + bias``."""
        y_TO = ops.w4a16_mm(x_TI, packed.packed, packed.scales_OG, None, packed.group_size)
        return y_TO if bias_O is None else y_TO + bias_O

    def _group_of(self, in_features: int) -> int:
        """The group size for rows of this length.

        Raises:
            ConfigError: there is none.
        """
        group_size = math.gcd(in_features, self._group_size)
        if in_features % 2 or (group_size != self._group_size and not self._on_load):
            raise ConfigError(
                f"A layer has {in_features} input features, which groups of {self._group_size} do not divide; "
                "choose another --quantization, or quantize the checkpoint with a smaller group_size."
            )
        return group_size
