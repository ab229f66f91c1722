"""Products of plain weights: kernels of our own for few tokens, torch's, and so cuBLAS's, for more."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dovetail_cuda.kernels import matvec, skinny


def linear(x_TI: Tensor, packed: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """See :func:`dovetail.ops.reference.linear`. Which kernel runs depends on shapes alone."""
    tokens = x_TI.shape[0]
    if matvec.suits(tokens, packed):
        return matvec.multiply(x_TI, packed, bias_O)
    if skinny.suits(tokens, packed):
        return skinny.multiply(x_TI, packed, bias_O)
    return F.linear(x_TI, packed, bias_O)
