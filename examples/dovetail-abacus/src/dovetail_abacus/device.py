"""The device: a torch device type named ``abacus``, through PrivateUse1, without compiled code.

Each of its tensors wraps one in host memory, where the beads are. Torch itself believes in the device: tensors say that
they are on ``abacus:0``, have no address that the host could read, and meet host tensors only in copies. An operation
that mixes the two raises, as on any accelerator.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

NAME = "abacus"
_PLACES = "abacus:0"
_ATEN = torch.ops.aten
_APART = {
    "arange": _ATEN.arange.default,
    "arange.start": _ATEN.arange.start,
    "arange.start_step": _ATEN.arange.start_step,
    "eye": _ATEN.eye.default,
    "eye.m": _ATEN.eye.m,
    "_copy_from": _ATEN._copy_from.default,
}
"""Operations that must be registered by name. Torch would compose the first ones of an empty tensor that grows, which
ours cannot; the last is called while torch builds a tensor from a list, and does not find its way by itself."""
_registered: list[torch.library.Library] = []


class AbacusTensor(Tensor):
    """A tensor on the abacus.

    Attributes:
        beads: the host tensor that holds its values; views share it as views of any device share memory.
    """

    beads: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls: type[AbacusTensor], beads: Tensor) -> AbacusTensor:
        """Put ``beads`` on the device; no values are copied."""
        with torch.inference_mode(False):  # a view must be of the same kind as its base, whenever that was made
            tensor = torch.Tensor._make_wrapper_subclass(
                cls,
                beads.size(),
                strides=beads.stride(),
                storage_offset=beads.storage_offset(),
                dtype=beads.dtype,
                device=_PLACES,
            )
        tensor.beads = beads
        return tensor

    def __init__(self, beads: Tensor) -> None:
        """All is done in ``__new__``."""

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every operation on a tensor of the device arrives here."""
        return _run(operation, *args, **(kwargs or {}))

    def tolist(self) -> Any:
        """Torch refuses this to wrappers; for a device it is a copy to the host."""
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"{self.beads!r} on {_PLACES}"


class _Module:
    """What torch expects of ``torch.abacus``."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def manual_seed_all(self, seed: int) -> None:
        """Random numbers are drawn on the host."""


def obstacle() -> str:
    """Why this process cannot have the device; empty if it can. Changes nothing."""
    taken = torch._C._get_privateuse1_backend_name()
    if taken not in ("privateuseone", NAME):
        return f"torch has room for one device type from outside, and {taken!r} holds it; uninstall that or use it"
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        return f"torch {torch.__version__} cannot take a device written in Python; install torch 2.13 or newer"
    return ""


@cache
def install() -> torch.device:
    """Make the device known to torch in this process, once."""
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(_run, "PrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    for name, operation in _APART.items():
        aten.impl(name, partial(_run, operation), "PrivateUse1")
    _registered.extend((everything, aten))  # they are taken back when they are collected
    return torch.device(_PLACES)


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function on beads, as one operation of the device: what a compiled kernel would be."""

    def launch(*args: Any) -> Any:
        return pytree.tree_map_only(Tensor, AbacusTensor, function(*(beads_of(arg) for arg in args)))

    return launch


def beads_of(value: Any) -> Any:
    """The beads of a tensor of the device; other values as they are.

    Raises:
        RuntimeError: it is a tensor of another device.
    """
    if isinstance(value, AbacusTensor):
        return value.beads
    if isinstance(value, Tensor):
        raise RuntimeError(f"a kernel of {_PLACES} was given a tensor on {value.device}")
    return value


def _run(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation of torch on the beads."""
    if operation.overloadpacket is _ATEN.to:  # in inference mode torch leaves it whole
        return operation.decompose(*args, **kwargs)
    if operation is _ATEN._to_copy.default:
        return _convert(*args, **kwargs)
    if operation is _ATEN.copy_.default:
        return _copy(*args)
    if operation is _ATEN._copy_from.default:
        return _copy(args[1], args[0])
    owners: dict[int, AbacusTensor] = {}

    def unwrap(value: Any) -> Any:
        if isinstance(value, AbacusTensor):
            owners[id(value.beads)] = value
            return value.beads
        if isinstance(value, Tensor) and value.dim():  # scalars go anywhere
            raise RuntimeError(f"{operation} mixes tensors on {_PLACES} and on {value.device}; move one with .to()")
        return torch.device("cpu") if isinstance(value, torch.device) else value

    args, kwargs = pytree.tree_map(unwrap, (args, kwargs))
    result = operation(*args, **kwargs)
    for owner in owners.values():
        if owner.shape != owner.beads.shape or owner.stride() != owner.beads.stride():
            raise RuntimeError(f"{operation} changes a shape in place, which {_PLACES} cannot do")

    def wrap(beads: Tensor) -> AbacusTensor:
        owner = owners.get(id(beads))
        return AbacusTensor(beads) if owner is None else owner

    return pytree.tree_map_only(Tensor, wrap, result)


def _convert(tensor: Tensor, *, device: torch.device | None = None, **changes: Any) -> Tensor:
    """A copy in another dtype, or on the other side."""
    beads = _ATEN._to_copy.default(tensor.beads if isinstance(tensor, AbacusTensor) else tensor, **changes)
    return beads if device is not None and torch.device(device).type == "cpu" else AbacusTensor(beads)


def _copy(target: Tensor, source: Tensor, *non_blocking: bool) -> Tensor:
    """Copy values in place, from either side to either side."""
    into, out_of = (x.beads if isinstance(x, AbacusTensor) else x for x in (target, source))
    into.copy_(out_of)
    return target
