"""The format itself: two weights in a byte, and a scale per group.

O: output features, I: input features, G: groups of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

ZERO = 8
"""The packed value that stands for 0; values are 0 to 15."""


def quantize(weight_OI: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Round each weight to one of 16 steps of its group.

    Args:
        weight_OI: any float dtype.
        group_size: consecutive input features that share a scale; divides I.

    Returns:
        uint8 ``[O, I / 2]``, feature ``2 j`` in the low half of byte ``j``; and float32 scales ``[O, G]``.
    """
    groups_OGI = weight_OI.float().unflatten(1, (-1, group_size))
    # The largest weight of a group, with its sign, becomes the end of the range that reaches farther: -8.
    largest_OG1 = groups_OGI.gather(2, groups_OGI.abs().argmax(2, keepdim=True))
    scale_OG1 = largest_OG1 / -ZERO
    scale_OG1 = torch.where(scale_OG1 == 0, torch.ones_like(scale_OG1), scale_OG1)
    values_OI = (groups_OGI / scale_OG1).round().add(ZERO).clamp(0, 15).to(torch.uint8).flatten(1)
    return values_OI[:, 0::2] | values_OI[:, 1::2] << 4, scale_OG1.squeeze(2)
