"""Shifts of integers, which torch_xla computes as products and quotients: negative numbers come out otherwise."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import torch
from jax import Array
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dovetail_tpu.bridges import jax_op


def _left(number: Array, places: Array) -> tuple[Array]:
    return (jnp.left_shift(number, places),)


def _right(number: Array, places: Array) -> tuple[Array]:
    return (jnp.right_shift(number, places),)


SHIFTS = MappingProxyType(
    {"__lshift__": _left, "bitwise_left_shift": _left, "__rshift__": _right, "bitwise_right_shift": _right}
)
"""By names of torch's functions."""


class Shifts(TorchFunctionMode):
    """While it is entered, numbers of torch_xla are shifted by JAX, and as torch does it.

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
        shift = SHIFTS.get(getattr(func, "__name__", ""))
        if shift is None or not any(isinstance(arg, Tensor) and arg.device == self._device for arg in args):
            return func(*args, **(kwargs or {}))
        dtype = torch.result_type(*args)
        operands = [torch.as_tensor(arg).to(self._device, dtype) for arg in args]
        return jax_op.call(shift, operands, {}, self._device_kind)[0]
