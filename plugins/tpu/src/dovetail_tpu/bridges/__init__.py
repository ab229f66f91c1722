"""Ways from torch to the chip, one of which is opened per process."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from types import MappingProxyType
from typing import TYPE_CHECKING

from dovetail.errors import ConfigError
from dovetail_tpu.bridges.xla_fit import check_fit, why_not

if TYPE_CHECKING:
    from dovetail_tpu.bridges.protocol import Bridge

AUTO = "auto"
NEEDS = MappingProxyType({"jax": ("jax", "torchax"), "torch_xla": ("torch_xla", "jax")})
"""Modules that each bridge imports, the preferred bridge first."""
_CLASSES = MappingProxyType(
    {"jax": "dovetail_tpu.bridges.jax_bridge:JaxBridge", "torch_xla": "dovetail_tpu.bridges.xla_bridge:XlaBridge"}
)
_opened: list[Bridge] = []


def installed() -> list[str]:
    """Bridges whose modules are installed, and fit. Imports none of them."""
    there = [name for name, modules in NEEDS.items() if all(map(_is_installed, modules))]
    return [name for name in there if name != "torch_xla" or not why_not()]


def open_bridge(name: str = AUTO, devices: int | None = None) -> Bridge:
    """The bridge of that name, or the best that is installed. The first call initialises the chips.

    Args:
        devices: that programs are spread over; all of this machine if not given.

    Raises:
        ConfigError: there is no such bridge, it is not installed, or it does not spread programs over so many.
    """
    there = installed()
    if name == AUTO:
        name = there[0] if there else next(iter(NEEDS))
    if name not in NEEDS:
        raise ConfigError(f"There is no bridge {name!r}; choose {', '.join(NEEDS)} or {AUTO}.")
    if name == "torch_xla":
        check_fit()
    elif name not in there:
        raise ConfigError(f"Bridge {name!r} needs the modules {', '.join(NEEDS[name])}, which are not all installed.")
    return use(_bridge(name, devices))


def use(bridge: Bridge) -> Bridge:
    """Make it the one that operations and attention backends run on."""
    _opened[:] = [bridge]
    return bridge


def current() -> Bridge:
    """The bridge that the platform of this process opened.

    Raises:
        ConfigError: none is.
    """
    if not _opened:
        raise ConfigError("Attention backends of the platform 'tpu' run on it alone: choose --platform tpu as well.")
    return _opened[0]


def _is_installed(package: str) -> bool:
    """By its metadata: torch_xla brings the folder of an old torchax along."""
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


@cache
def _bridge(name: str, devices: int | None) -> Bridge:
    module, _, class_name = _CLASSES[name].partition(":")
    bridge: Bridge = getattr(import_module(module), class_name).open(devices)
    return bridge
