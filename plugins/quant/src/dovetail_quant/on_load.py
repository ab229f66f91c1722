"""What every method that quantizes plain checkpoints while loading has in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.contracts.quant import QuantMethod, TensorSpec

PLAIN_LAYERS = frozenset({"lm_head", "gate", "router"})
"""Last parts of the names of layers that stay plain.

The output head turns small errors into other tokens, and a router's into other experts; both are a small part of the
work per token.
"""


class OnLoad(QuantMethod):
    """Plain weights in, 8-bit weights with a scale per output feature out.

    Attributes:
        dtype: of the weights: int8 (-127 .. 127) or float8_e4m3fn.
    """

    dtype: ClassVar[torch.dtype]

    @classmethod
    def recognises(cls, quantization_config: Mapping[str, Any]) -> bool:
        """Never: checkpoints with such a section are quantized already."""
        return False

    def __init__(self, quantization_config: Mapping[str, Any] | None = None) -> None:
        """There is nothing to configure."""

    def applies_to(self, layer: str) -> bool:
        """All but the output head and routers."""
        return layer.rpartition(".")[2] not in PLAIN_LAYERS

    def tensors(self, in_features: int, out_features: int, dtype: torch.dtype) -> Mapping[str, TensorSpec]:
        """One plain ``weight`` ``[O, I]``."""
        return {"weight": TensorSpec(shape=(out_features, in_features), dtype=dtype)}

    def quantize(self, weight_OI: Tensor, ops: OpTable) -> tuple[Tensor, Tensor]:
        """The weight in 8 bits, and the float32 scales ``[O, 1]`` by which to multiply it.

        The largest magnitude of each output's weights becomes the largest number of the format, exactly as activations
        are quantized per token.
        """
        return ops.quantize_rows(weight_OI, self.dtype)
