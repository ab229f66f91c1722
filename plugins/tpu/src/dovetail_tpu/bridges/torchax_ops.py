"""What torchax lacks to trace this project's code. It depends on torchax's private parts, whose version is pinned."""

from __future__ import annotations

from typing import Any

import torch
import torchax
from jax import Array, lax
from torch.utils import _pytree as pytree
from torchax.ops import mappings, op_base
from torchax.ops.ops_registry import Operator
from torchax.tensor import Environment, OperatorNotFound
from torchax.view import View

from dovetail_tpu.bridges.transfers import array_of


class TracingEnvironment(Environment):  # type: ignore[misc]  # torchax has no types
    """torchax, with the operations that it lacks, and tensors of the host among its own.

    Attributes:
        constants: arrays of tensors of the host that were met, by identity; whoever traces empties it afterwards.
    """

    def __init__(self) -> None:
        super().__init__()
        self.constants: dict[int, tuple[torch.Tensor, Array]] = {}
        self._ops[torch.ops.aten.view.dtype] = _operator(torch.ops.aten.view.dtype, _bitcast, is_jax=True)
        self._getitem = self._ops[torch.Tensor.__getitem__].func
        self._ops[torch.Tensor.__getitem__] = _operator(torch.Tensor.__getitem__, self._item)

    def t2j_iso(self, torchtensors: Any) -> Any:
        """Unwrap arrays. A tensor of the host is one more constant of the program, whatever its shape: torchax would
        bake scalars into it, and refuse others.
        """
        return pytree.tree_map_only(torch.Tensor, self._array, torchtensors)

    def _item(self, tensor: torch.Tensor, indexes: Any) -> torch.Tensor:
        """``tensor[indexes]``, also of a view, or a tensor of the host, by tensors."""
        parts = indexes if isinstance(indexes, tuple) else (indexes,)
        if any(isinstance(part, torch.Tensor) for part in parts):
            return wrapped(self._array(tensor)[self.t2j_iso(indexes)], self)
        item: torch.Tensor = self._getitem(tensor, indexes)
        return item

    def _array(self, tensor: torch.Tensor) -> Array:
        if isinstance(tensor, torchax.tensor.Tensor | View):
            return tensor.jax()
        if id(tensor) not in self.constants:
            self.constants[id(tensor)] = tensor, array_of(tensor)
        return self.constants[id(tensor)][1]

    def _get_op_or_decomp(self, func: Any) -> Operator:
        """As its base. An operation that changes its first argument becomes one that does not, whose result is assigned
        then; others are decomposed by torch.
        """
        try:
            return super()._get_op_or_decomp(func)
        except OperatorNotFound:
            if not isinstance(func, torch._ops.OpOverload):
                raise
            plain = _without_underscore(func)
            if plain is not None:
                return _operator(func, op_base.InplaceOp(plain))
            if func._can_decompose():
                return _operator(func, func.decompose)
            raise


def _without_underscore(func: torch._ops.OpOverload) -> Any:
    """``aten::neg`` for ``aten::neg_``; None for what does not change its argument."""
    name = func.overloadpacket.__name__
    if func.namespace != "aten" or not name.endswith("_"):
        return None
    return getattr(torch.ops.aten, name[:-1], None)


def _operator(torch_op: Any, function: Any, is_jax: bool = False) -> Operator:
    return Operator(
        torch_op, function, is_jax_function=is_jax, is_user_defined=True, needs_env=False, is_view_op=not is_jax
    )


def _bitcast(x: Array, dtype: torch.dtype) -> Array:
    """``Tensor.view(dtype)``, between element sizes as torch does it: along the last dimension."""
    new = mappings.t2j_dtype(dtype)
    ratio = x.dtype.itemsize // new.itemsize
    if ratio > 1:
        return lax.bitcast_convert_type(x, new).reshape(*x.shape[:-1], x.shape[-1] * ratio)
    if new.itemsize > x.dtype.itemsize:
        x = x.reshape(*x.shape[:-1], -1, new.itemsize // x.dtype.itemsize)
    return lax.bitcast_convert_type(x, new)


def wrapped(array: Array, env: TracingEnvironment) -> torch.Tensor:
    """A torch tensor around an array, which may be traced."""
    tensor: torch.Tensor = torchax.tensor.Tensor(array, env)
    return tensor
