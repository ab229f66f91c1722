"""Quantized weights of all experts of a mixture, for platforms that multiply them together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable, PackedExperts
from dovetail.ops import reference


class Stacked(NamedTuple):
    """What ``quantized_experts_pack`` returned, and the order of the inputs if it is not their own."""

    weight: PackedExperts
    order_I: Tensor | None = None


def together(ops: OpTable) -> bool:
    """Whether the platform has a product over all experts; others compute one by one faster than its reference."""
    return ops.quantized_experts_mm is not reference.quantized_experts_mm


def stack(experts: Iterable[tuple[Tensor, Tensor]], group_size: int | None, ops: OpTable) -> Stacked:
    """Weights ``[O, I]`` and their scales ``[O, G]``."""
    weights, scales = zip(*experts, strict=True)
    return Stacked(ops.quantized_experts_pack(torch.stack(weights), torch.stack(scales), None, group_size))
