"""fp8 checkpoints with a scale per block of the weight (DeepSeek-AI 2024, arXiv:2412.19437, section 3.3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.contracts.quant import PackedLinear, RowFormat, RowProduct, TensorSpec
from dovetail_quant.experts import Stacked, stack


class BlockScaled:
    """Weights in blocks, usually 128 × 128; activations quantized per token and per block of inputs in every step.

    Blocks at the edges may be smaller, and so may those at the end of each part of a merged layer: every part keeps the
    blocks of its own tensor.

    Args:
        block: output and input features of a block.
    """

    def __init__(self, block: tuple[int, int]) -> None:
        self._outputs, self._inputs = block
        self._rows = RowFormat(torch.float8_e4m3fn, self._inputs)

    def tensors(self, in_features: int, out_features: int, dtype: torch.dtype) -> Mapping[str, TensorSpec]:
        """``weight`` ``[O, I]``, and ``weight_scale_inv`` with a number per block, by which to multiply the weight."""
        blocks = -(-in_features // self._inputs)
        return {
            "weight": TensorSpec(shape=(out_features, in_features), dtype=torch.float8_e4m3fn),
            "weight_scale_inv": TensorSpec(shape=(out_features, blocks), dtype=torch.float32, repeat=self._outputs),
        }

    def prepare(self, tensors: Mapping[str, Tensor], ops: OpTable, dtype: torch.dtype) -> PackedLinear:
        """The platform's packed form."""
        return ops.block_scaled_pack(tensors["weight"], tensors["weight_scale_inv"], self._inputs)

    def apply(self, x_TI: Tensor, packed: PackedLinear, bias_O: Tensor | None, ops: OpTable) -> Tensor:
        """Quantize each token's blocks, multiply, scale, add the bias."""
        return _product(*ops.quantize_rows(x_TI, *self._rows), packed, bias_O, x_TI.dtype, ops)

    def row_product(self) -> RowProduct:
        """What ``apply`` does with quantized blocks."""
        return RowProduct(self._rows, _product)

    def stack_experts(self, experts: Iterable[Mapping[str, Tensor]], ops: OpTable) -> Stacked:
        """All together."""
        return stack(((tensors["weight"], tensors["weight_scale_inv"]) for tensors in experts), self._inputs, ops)

    def apply_stacked(self, x_NI: Tensor, packed: Stacked, starts_E1: Tensor, ops: OpTable) -> Tensor:
        """Quantize each row's blocks, and multiply with its expert's weight."""
        values_NI, scale_NG = ops.quantize_rows(x_NI, *self._rows)
        return ops.quantized_experts_mm(values_NI, packed.weight, starts_E1, scale_NG, x_NI.dtype)


def _product(
    x_TI: Tensor, x_scale_TG: Tensor, packed: PackedLinear, bias_O: Tensor | None, dtype: torch.dtype, ops: OpTable
) -> Tensor:
    """The product of a quantized ``x`` in ``dtype``, and the bias."""
    y_TO = ops.block_scaled_mm(x_TI, packed, x_scale_TG, dtype)
    return y_TO if bias_O is None else y_TO + bias_O
