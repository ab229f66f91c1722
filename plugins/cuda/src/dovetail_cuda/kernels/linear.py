"""Products of plain weights: a kernel of our own for few tokens, torch's, and so cuBLAS's, for more."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dovetail_cuda.kernels import matvec
from dovetail_cuda.kernels.activation import silu_and_mul


def linear(x_TI: Tensor, packed: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """See :func:`dovetail.ops.reference.linear`. Which kernel runs depends on shapes alone."""
    if matvec.suits(len(x_TI), packed):
        return matvec.multiply(x_TI, packed, bias_O)
    return F.linear(x_TI, packed, bias_O)


def linear_silu_and_mul(x_TI: Tensor, packed: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """See :func:`dovetail.ops.reference.linear_silu_and_mul`. Which kernels run depends on shapes alone."""
    if matvec.suits(len(x_TI), packed):
        return matvec.multiply(x_TI, packed, bias_O, gated=True)
    return silu_and_mul(F.linear(x_TI, packed, bias_O))
