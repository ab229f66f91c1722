"""A weight in 8 bits that is multiplied with activations in 8 bits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable, PackedWeight


class Scaled(NamedTuple):
    """A weight as ``scaled_mm_pack`` left it, and its float32 scales ``[O, 1]``."""

    weight: PackedWeight
    scale_O1: Tensor


def scaled_product(
    x_TI: Tensor, x_scale_T1: Tensor, packed: Scaled, bias_O: Tensor | None, dtype: torch.dtype, ops: OpTable
) -> Tensor:
    """The product of a quantized ``x`` in ``dtype``, and the bias."""
    y_TO = ops.scaled_mm(x_TI, packed.weight, x_scale_T1, packed.scale_O1, dtype)
    return y_TO if bias_O is None else y_TO + bias_O
