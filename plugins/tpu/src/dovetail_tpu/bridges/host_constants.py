"""Tensors of the host that a traced step meets: each becomes a constant of the program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dovetail.tensors import leaves, replaced


class HostConstants(TorchFunctionMode):
    """While it is entered, operations on tensors of torch_xla take tensors of the host, too.

    Args:
        device: torch_xla's.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._constants: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Bring tensors of the host to the chip where others are there already.

        Raises:
            RuntimeError: a step writes to a tensor that was not adopted.
        """
        kwargs = kwargs or {}
        tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(tensor.device == self._device for tensor in tensors):
            written = _written(func, args)
            if written is not None and written.device != self._device:
                raise RuntimeError(
                    f"A compiled step writes to a tensor of the host, of shape {tuple(written.shape)}, by"
                    f" {func.__name__}. What steps change has to be adopted: see Platform.adopt."
                )
            args, kwargs = replaced((args, kwargs), self._on_chip)
        return func(*args, **kwargs)

    def _on_chip(self, tensor: Tensor) -> Tensor:
        if tensor.device == self._device:
            return tensor
        if id(tensor) not in self._constants:
            self._constants[id(tensor)] = tensor, tensor.to(self._device)
        return self._constants[id(tensor)][1]


def _written(func: Callable[..., Any], args: tuple[Any, ...]) -> Tensor | None:
    """The tensor that a function changes; None if it changes none."""
    name = getattr(func, "__name__", "")
    changes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    return args[0] if changes and isinstance(args[0], Tensor) else None
