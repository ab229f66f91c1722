"""What torch_xla computes otherwise than torch, or not on the chip: JAX does.

Shifts are products and quotients there, which come out otherwise for negative numbers. Running products of integers,
and searches, would be computed on the host. Copies of floating-point rows by their index end the process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import torch
from jax import Array
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dovetail_tpu.bridges import jax_op


class Corrections(TorchFunctionMode):
    """While it is entered, such operations on tensors of torch_xla are JAX's.

    Args:
        device: torch_xla's.
        device_kind: what JAX lowers for.
    """

    def __init__(self, device: torch.device, device_kind: str) -> None:
        super().__init__()
        self._device = device
        self._device_kind = device_kind

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        corrected = CORRECTED.get(getattr(func, "__name__", ""))
        if corrected is None or not any(isinstance(arg, Tensor) and arg.device == self._device for arg in args):
            return func(*args, **(kwargs or {}))
        return corrected(self, *args, **(kwargs or {}))

    def shift_left(self, number: Tensor, places: Tensor | int) -> Tensor:
        """``number << places``."""
        return self._shift(_left, number, torch.as_tensor(places))

    def shift_right(self, number: Tensor, places: Tensor | int) -> Tensor:
        """``number >> places``."""
        return self._shift(_right, number, torch.as_tensor(places))

    def cumprod(self, numbers: Tensor, dim: int) -> Tensor:
        """Running products along a dimension."""
        numbers = numbers if numbers.is_floating_point() else numbers.to(torch.int64)
        return jax_op.call(_products, [numbers], {"dim": dim}, self._device_kind)[0]

    def searchsorted(self, sorted_N: Tensor, values_M: Tensor) -> Tensor:
        """Where to insert values before those that are not less."""
        return jax_op.call(_places, [sorted_N, values_M], {}, self._device_kind)[0]

    def index_copy_(self, into: Tensor, dim: int, index_N: Tensor, rows: Tensor) -> Tensor:
        """Rows at their places along a dimension, in place."""
        (changed,) = jax_op.call(_copied, [into, index_N, rows], {"dim": dim}, self._device_kind)
        return into.copy_(changed)

    def _shift(self, function: Callable[..., tuple[Array]], number: Tensor, places: Tensor) -> Tensor:
        dtype = torch.result_type(number, places)
        operands = [operand.to(self._device, dtype) for operand in (number, places)]
        return jax_op.call(function, operands, {}, self._device_kind)[0]


CORRECTED: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "__lshift__": Corrections.shift_left,
        "bitwise_left_shift": Corrections.shift_left,
        "__rshift__": Corrections.shift_right,
        "bitwise_right_shift": Corrections.shift_right,
        "cumprod": Corrections.cumprod,
        "index_copy_": Corrections.index_copy_,
        "searchsorted": Corrections.searchsorted,
    }
)
"""By names of torch's functions."""


def _left(number: Array, places: Array) -> tuple[Array]:
    return (jnp.left_shift(number, places),)


def _right(number: Array, places: Array) -> tuple[Array]:
    return (jnp.right_shift(number, places),)


def _products(numbers: Array, *, dim: int) -> tuple[Array]:
    return (jnp.cumprod(numbers, axis=dim),)


def _places(sorted_N: Array, values_M: Array) -> tuple[Array]:
    return (jnp.searchsorted(sorted_N, values_M, method="compare_all").astype(jnp.int64),)


def _copied(into: Array, index_N: Array, rows: Array, *, dim: int) -> tuple[Array]:
    return (into.at[(slice(None),) * dim + (index_N,)].set(rows),)
