"""4-bit checkpoints of AWQ (Lin et al. 2023, arXiv:2306.00978), as AutoAWQ writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.contracts.quant import PackedLinear, TensorSpec
from dovetail.errors import ConfigError
from dovetail_quant.four_bits import PER_WORD, FourBits, Pairs, checked, group_size, joined, points, spread

ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where the values of a word lie, from the lowest bits on, by the output that they belong to."""
SPELT = {"bits": "w_bit", "group_size": "q_group_size"}
"""Older names of fields."""


class Awq(FourBits):
    """Words hold eight outputs of one input, in an order of their own."""

    name: ClassVar[str] = "awq"

    def __init__(self, quantization_config: Mapping[str, Any] | None = None) -> None:
        """Read the section.

        Raises:
            ConfigError: a field has a value that cannot be honoured; the message names both.
        """
        section = quantization_config or {}
        older = any(old in section for old in SPELT.values())
        names = {new: old if older and new not in section else new for new, old in SPELT.items()}
        checked(section, names["bits"], (4,))
        self._group = group_size(section, names["group_size"])
        checked(section, "zero_point", (True,))
        checked(section, "version", ("gemm", "GEMM"))
        self._plain = section.get("modules_to_not_convert") or []
        if not isinstance(self._plain, list) or not all(isinstance(entry, str) and entry for entry in self._plain):
            raise ConfigError(
                f"'modules_to_not_convert' in quantization_config of config.json is {self._plain!r}; "
                "it must be a list of module names."
            )

    def applies_to(self, layer: str) -> bool:
        """All but the output head, routers, and the modules that the checkpoint lists by parts of their names."""
        return super().applies_to(layer) and not any(entry in layer for entry in self._plain)

    def group_of(self, in_features: int) -> int:
        """The section's, or all inputs."""
        return self._group or in_features

    def tensors(self, in_features: int, out_features: int, dtype: torch.dtype) -> Mapping[str, TensorSpec]:
        """``qweight`` and the grids.

        Raises:
            ConfigError: words or groups do not divide the layer.
        """
        words = (in_features, out_features // PER_WORD)
        qweight = TensorSpec(shape=words, dtype=torch.int32, output_dim=1, output_scale=(1, PER_WORD))
        return {**self.grids(in_features, out_features), "qweight": qweight}

    def prepare(self, tensors: Mapping[str, Tensor], ops: OpTable, dtype: torch.dtype) -> PackedLinear:
        """Put outputs in order, then inputs side by side."""
        weight_IO, zero_GO = _in_order(tensors["qweight"]), _in_order(tensors["qzeros"])
        group = self.group_of(len(weight_IO))
        return Pairs(joined(weight_IO.t().contiguous()), tensors["scales"].t(), points(zero_GO, dtype), group, None)


def _in_order(words: Tensor) -> Tensor:
    """uint8 ``[R, O]``: the values of int32 ``[R, O / 8]``."""
    return spread(words).view(*words.shape, PER_WORD)[:, :, list(ORDER)].flatten(1)
