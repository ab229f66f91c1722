"""Views of any leading dimensions as rows that a kernel can walk: at most two strides, and dense columns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Row ``i`` begins at ``(i // inner) × strides[0] + (i % inner) × strides[1]``; its columns are contiguous.

    Attributes:
        tensor: whose first element is the first row's first.
        count, width: of rows and of their elements.
        inner: rows that share an outer index.
        strides: outer and inner, in elements.
    """

    tensor: Tensor
    count: int
    width: int
    inner: int
    strides: tuple[int, int]


def as_rows(x: Tensor) -> Rows:
    """The rows of ``[..., D]``; copies only what two strides cannot describe."""
    if x.dim() not in (2, 3) or x.stride(-1) != 1:
        x = x.reshape(-1, x.shape[-1]).contiguous()
    inner = 1 if x.dim() == 2 else x.shape[1]
    inner_stride = 0 if x.dim() == 2 else x.stride(1)
    return Rows(x, x.shape[0] * inner, x.shape[-1], inner, (x.stride(0), inner_stride))
