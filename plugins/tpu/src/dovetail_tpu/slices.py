"""Slices: what can be rented, by the names that the cloud gives them."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from types import MappingProxyType

from dovetail.errors import ConfigError
from dovetail_tpu.kernels.chip import CHIPS, Chip


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Chips of one host.

    Attributes:
        name: as it is rented.
        chip: its generation.
        chips: how many.
        devices: that JAX shows; a v4 or tpu7x chip is two.
    """

    name: str
    chip: Chip
    chips: int
    devices: int

    @property
    def topology(self) -> str:
        """The smallest that the chips' compiler knows and that holds the slice."""
        return TOPOLOGIES[self.chip.name][self.chips]


COUNTED = MappingProxyType({"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1, "tpu7x": 2})
"""What one chip adds to the number in a slice's name: some generations count cores."""
DEVICES = MappingProxyType({"v4": 2, "v5e": 1, "v5p": 1, "v6e": 1, "tpu7x": 2})
"""Of one chip."""
_FLAT = MappingProxyType({1: "2x2", 4: "2x2", 8: "2x4"})
_DEEP = MappingProxyType({1: "2x2x1", 4: "2x2x1"})
TOPOLOGIES = MappingProxyType({"v4": _DEEP, "v5e": _FLAT, "v5p": _DEEP, "v6e": _FLAT, "tpu7x": _DEEP})
"""By number of chips: those of one host, which is what the platform runs on."""
ALIASES = MappingProxyType({"v5litepod": "v5e", "ironwood": "tpu7x"})


def _slices() -> dict[str, Slice]:
    found = [
        Slice(name=f"{name}-{chips * COUNTED[name]}", chip=CHIPS[name], chips=chips, devices=chips * DEVICES[name])
        for name in CHIPS
        for chips in TOPOLOGIES[name]
    ]
    return {part.name: part for part in found}


SLICES = MappingProxyType(_slices())
"""By name, e.g. ``v6e-8``."""


def slice_of(name: str) -> Slice:
    """A slice by its name, in any case, as ``v5litepod-4`` too.

    Raises:
        ConfigError: there is none of this name, or it spans hosts; says which there are.
    """
    generation, _, number = name.lower().partition("-")
    generation = ALIASES.get(generation, generation)
    found = SLICES.get(f"{generation}-{number}")
    if found is not None:
        return found
    known = ", ".join(SLICES)
    if generation in CHIPS and re.fullmatch(r"[1-9]\d*", number):
        raise ConfigError(f"{name!r} is not a slice of one host, and the platform runs on one. Take one of {known}.")
    nearest = difflib.get_close_matches(f"{generation}-{number}", SLICES, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ConfigError(f"There is no slice {name!r}.{hint} Take one of {known}.")
