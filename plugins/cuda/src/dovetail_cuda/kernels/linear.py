"""Products of plain weights: kernels of our own for few tokens and for dozens, torch's, and so cuBLAS's, for more."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dovetail_cuda.kernels import matvec, skinny_support
from dovetail_cuda.kernels.activation import silu_and_mul


def linear(x_TI: Tensor, packed: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """See :func:`dovetail.ops.reference.linear`. Which kernel runs depends on shapes alone."""
    if matvec.suits(len(x_TI), packed):
        return matvec.multiply(x_TI, packed, bias_O)
    if skinny_support.suits(x_TI, packed):
        return _skinny(x_TI, packed, bias_O)
    return F.linear(x_TI, packed, bias_O)


def linear_silu_and_mul(x_TI: Tensor, packed: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """See :func:`dovetail.ops.reference.linear_silu_and_mul`. Which kernels run depends on shapes alone."""
    if matvec.suits(len(x_TI), packed):
        return matvec.multiply(x_TI, packed, bias_O, gated=True)
    if skinny_support.suits(x_TI, packed):
        return _skinny(x_TI, packed, bias_O, gated=True)
    return silu_and_mul(F.linear(x_TI, packed, bias_O))


def _skinny(x_TI: Tensor, packed: Tensor, bias_O: Tensor | None, *, gated: bool = False) -> Tensor:
    from dovetail_cuda.kernels import skinny  # not every release of Triton can

    return skinny.multiply(x_TI, packed, bias_O, gated=gated)
