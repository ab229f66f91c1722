"""fp8 checkpoints with one scale per weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.contracts.quant import PackedLinear, RowFormat, RowProduct, TensorSpec
from dovetail_quant.experts import Stacked, stack
from dovetail_quant.scaled import Scaled, scaled_product

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


class Part(NamedTuple):
    """Consecutive outputs whose activations share a scale."""

    weight: Scaled
    input_scale_11: Tensor
    bias: slice


class TensorScaled:
    """One scale per tensor of the checkpoint; merged layers keep that of each part.

    Args:
        static: activations have a scale in the checkpoint as well; else they are quantized per token in every step.
    """

    def __init__(self, *, static: bool) -> None:
        self._static = static

    def tensors(self, in_features: int, out_features: int, dtype: torch.dtype) -> Mapping[str, TensorSpec]:
        """``weight`` ``[O, I]``, its ``weight_scale``, and for static activations their ``input_scale``.

        transformers names the scales ``weight_scale_inv`` and ``activation_scale``; it multiplies by them all the same.
        """
        number = TensorSpec(shape=(out_features,), dtype=torch.float32, broadcast=True)
        specs = {
            "weight": TensorSpec(shape=(out_features, in_features), dtype=FP8),
            "weight_scale": replace(number, also=("weight_scale_inv",)),
        }
        return {**specs, "input_scale": replace(number, also=("activation_scale",))} if self._static else specs

    def prepare(self, tensors: Mapping[str, Tensor], ops: OpTable, dtype: torch.dtype) -> PackedLinear:
        """Pack; parts of a merged layer whose activations have different scales stay apart."""
        weight_OI, scale_O1 = tensors["weight"], tensors["weight_scale"].unsqueeze(1)
        if not self._static:
            return Scaled(ops.scaled_mm_pack(weight_OI), scale_O1)
        input_scale_O, parts, end = tensors["input_scale"], [], 0
        for _, equal in groupby(input_scale_O.tolist()):
            rows = slice(end, end := end + len(list(equal)))
            scaled = Scaled(ops.scaled_mm_pack(weight_OI[rows]), scale_O1[rows].clone())
            parts.append(Part(scaled, input_scale_O[rows][:1].view(1, 1).clone(), rows))
        # a platform may hold an output more than once: all that follow are the last part's
        parts[-1] = parts[-1]._replace(bias=slice(parts[-1].bias.start, None))
        return parts

    def apply(self, x_TI: Tensor, packed: PackedLinear, bias_O: Tensor | None, ops: OpTable) -> Tensor:
        """Quantize the activations, multiply, scale, add the bias."""
        if not self._static:
            return scaled_product(*ops.quantize_rows(x_TI, FP8), packed, bias_O, x_TI.dtype, ops)
        outputs = [self._part(x_TI, part, bias_O, ops) for part in packed]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def row_product(self) -> RowProduct | None:
        """What ``apply`` does with quantized tokens."""
        return None if self._static else RowProduct(RowFormat(FP8), scaled_product)

    def stack_experts(self, experts: Iterable[Mapping[str, Tensor]], ops: OpTable) -> Stacked | None:
        """All together, if activations are quantized per row."""
        if self._static:
            return None
        return stack(((tensors["weight"], tensors["weight_scale"].unsqueeze(1)) for tensors in experts), None, ops)

    def apply_stacked(self, x_NI: Tensor, packed: Stacked, starts_E1: Tensor, ops: OpTable) -> Tensor:
        """Quantize each row, and multiply with its expert's weight."""
        values_NI, scale_N1 = ops.quantize_rows(x_NI, FP8)
        return ops.quantized_experts_mm(values_NI, packed.weight, starts_E1, scale_N1, x_NI.dtype)

    @staticmethod
    def _part(x_TI: Tensor, part: Part, bias_O: Tensor | None, ops: OpTable) -> Tensor:
        values_TI = (x_TI.float() / part.input_scale_11).clamp(-LARGEST, LARGEST).to(FP8)
        bias = None if bias_O is None else bias_O[part.bias]
        return scaled_product(values_TI, part.input_scale_11, part.weight, bias, x_TI.dtype, ops)
