"""fp8 (e4m3) weights: quantized on load, or read from checkpoints with ``quant_method: "fp8"``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.contracts.quant import PackedLinear, QuantMethod, RowProduct, TensorSpec
from dovetail_quant.block_scaled import BlockScaled
from dovetail_quant.experts import Stacked, together
from dovetail_quant.fp8_section import Fp8Section
from dovetail_quant.on_load import PLAIN_LAYERS
from dovetail_quant.tensor_scaled import TensorScaled
from dovetail_quant.weight_only import Fp8WeightOnly

Format = Fp8WeightOnly | TensorScaled | BlockScaled


class Fp8(QuantMethod):
    """Passes on to the format of the checkpoint at hand."""

    @classmethod
    def recognises(cls, quantization_config: Mapping[str, Any]) -> bool:
        """Whether it says ``fp8``; what it says beyond that is checked when the model is built."""
        return quantization_config.get("quant_method") == "fp8"

    def __init__(self, quantization_config: Mapping[str, Any] | None = None) -> None:
        """Choose the format.

        Raises:
            ConfigError: a field has a value that cannot be honoured; the message names both.
        """
        self._section = None if quantization_config is None else Fp8Section.parse(quantization_config)
        self._format = _format(self._section)

    def applies_to(self, layer: str) -> bool:
        """All but the output head, routers, and the modules that the checkpoint lists.

        Raises:
            ConfigError: the checkpoint lists some parts of a merged layer, but not all.
        """
        if self._section is None:
            return Fp8WeightOnly().applies_to(layer)
        return layer.rpartition(".")[2] not in PLAIN_LAYERS and not self._section.leaves_plain(layer)

    def tensors(self, in_features: int, out_features: int, dtype: torch.dtype) -> Mapping[str, TensorSpec]:
        """The format's."""
        return self._format.tensors(in_features, out_features, dtype)

    def prepare(self, tensors: Mapping[str, Tensor], ops: OpTable, dtype: torch.dtype) -> PackedLinear:
        """In the format's way."""
        return self._format.prepare(tensors, ops, dtype)

    def apply(self, x_TI: Tensor, packed: PackedLinear, bias_O: Tensor | None, ops: OpTable) -> Tensor:
        """In the format's way."""
        return self._format.apply(x_TI, packed, bias_O, ops)

    def row_product(self) -> RowProduct | None:
        """The format's."""
        return self._format.row_product()

    def prepare_experts(
        self, experts: Iterable[Mapping[str, Tensor]], ops: OpTable, dtype: torch.dtype
    ) -> PackedLinear:
        """In the format's way: all together, where the platform multiplies them so."""
        if isinstance(self._format, Fp8WeightOnly):
            return self._format.prepare_experts(experts, ops, dtype)
        stacked = self._format.stack_experts(experts, ops) if together(ops) else None
        return super().prepare_experts(experts, ops, dtype) if stacked is None else stacked

    def apply_experts(self, x_NI: Tensor, packed: PackedLinear, starts_E1: Tensor, ops: OpTable) -> Tensor:
        """In the format's way."""
        if isinstance(self._format, Fp8WeightOnly):
            return self._format.apply_experts(x_NI, packed, starts_E1, ops)
        if not isinstance(packed, Stacked):
            return super().apply_experts(x_NI, packed, starts_E1, ops)
        return self._format.apply_stacked(x_NI, packed, starts_E1, ops)


def _format(section: Fp8Section | None) -> Format:
    if section is None:
        return Fp8WeightOnly()
    if section.block is None:
        return TensorScaled(static=section.static)
    return BlockScaled(section.block)
