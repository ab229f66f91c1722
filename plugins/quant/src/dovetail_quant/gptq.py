"""4-bit checkpoints of GPTQ (Frantar et al. 2022, arXiv:2210.17323), as AutoGPTQ and GPTQModel write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.contracts.quant import PackedLinear, TensorSpec
from dovetail.errors import ConfigError
from dovetail_quant.four_bits import PER_WORD, FourBits, Pairs, checked, group_size, joined, points, spread

FORMATS = ("gptq", "gptq_v2")
"""The first stores zero points less one."""


class Gptq(FourBits):
    """Words hold eight inputs of one output. Fields that only say how the weights were found are not looked at."""

    name: ClassVar[str] = "gptq"

    def __init__(self, quantization_config: Mapping[str, Any] | None = None) -> None:
        """Read the section.

        Raises:
            ConfigError: a field has a value that cannot be honoured; the message names both.
        """
        section = quantization_config or {}
        checked(section, "bits", (4,))
        self._group = group_size(section, "group_size")
        self._any_order = checked(section, "desc_act", (False, True))
        self._offset = 1 if checked(section, "checkpoint_format", FORMATS) == "gptq" else 0
        checked(section, "lm_head", (False,))
        checked(section, "dynamic", ({},))
        checked(section, "pack_dtype", ("int32",))
        checked(section, "modules_in_block_to_quantize", ([],))

    def group_of(self, in_features: int) -> int:
        """The section's, or all inputs."""
        return self._group or in_features

    def tensors(self, in_features: int, out_features: int, dtype: torch.dtype) -> Mapping[str, TensorSpec]:
        """``qweight``, the grids, and the group of each input.

        Raises:
            ConfigError: words or groups do not divide the layer.
        """
        words = (in_features // PER_WORD, out_features)
        return {
            **self.grids(in_features, out_features),
            "qweight": TensorSpec(shape=words, dtype=torch.int32, output_dim=1),
            "g_idx": TensorSpec(shape=(in_features,), dtype=torch.int32, output_dim=None, optional=True),
        }

    def prepare(self, tensors: Mapping[str, Tensor], ops: OpTable, dtype: torch.dtype) -> PackedLinear:
        """Put inputs of a group side by side.

        Raises:
            ConfigError: inputs are in another order than the section says, or not in groups of its size.
        """
        qweight, scale_GO = tensors["qweight"], tensors["scales"]
        inputs = qweight.shape[0] * PER_WORD
        group, order_I = self.group_of(inputs), self._order(tensors.get("g_idx"), inputs)
        words_OI = qweight.t().contiguous()
        weight = words_OI.view(torch.uint8) if order_I is None else joined(spread(words_OI)[:, order_I])
        zero_GO = spread(tensors["qzeros"]) + self._offset
        return Pairs(weight, scale_GO.t(), points(zero_GO, dtype), group, order_I)

    def _order(self, group_I: Tensor | None, inputs: int) -> Tensor | None:
        """How to sort inputs by group."""
        group = self.group_of(inputs)
        if group_I is None:
            return None
        sorted_I, order_I = group_I.sort(stable=True)
        usual_I = torch.arange(inputs, dtype=group_I.dtype, device=group_I.device) // group
        if not torch.equal(sorted_I, usual_I):
            raise ConfigError(
                f"'g_idx' of a layer has other groups than of {group} inputs each, as 'group_size' in "
                "quantization_config of config.json says; use another checkpoint."
            )
        if torch.equal(group_I, usual_I):
            return None
        if not self._any_order:
            raise ConfigError("'desc_act' in quantization_config of config.json is false, but a layer has an order.")
        return order_I
