"""The ``quantization_config`` of checkpoints in fp8."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dovetail.errors import ConfigError

MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Layers that are computed as one, and their parts' names in checkpoints."""

HONOURED: Mapping[str, tuple[object, ...]] = {
    "quant_method": ("fp8",),
    "activation_scheme": ("dynamic", "static"),
    "fmt": ("e4m3", "float8_e4m3fn"),
    "scale_fmt": ("float",),
    "expert_dtype": ("fp8",),
    "dequantize": (False,),
    "modules_to_convert": ([],),
}
"""Fields with a fixed set of values; absent and null mean the usual one."""

LISTS = ("modules_to_not_convert", "ignored_layers")
"""Two names of the list of modules that are plain."""

KNOWN = (*HONOURED, *LISTS, "weight_block_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Section:
    """What it says.

    Attributes:
        block: output and input features that share a scale; None for one scale per tensor.
        static: the checkpoint brings the scales of activations.
        plain: finds the names of modules that are not quantized.
    """

    block: tuple[int, int] | None
    static: bool
    plain: tuple[re.Pattern[str], ...]

    @classmethod
    def parse(cls, section: Mapping[str, Any]) -> Fp8Section:
        """Read it.

        Raises:
            ConfigError: a field has a value that cannot be honoured, or a meaning that is not known here.
        """
        for name, value in section.items():
            if name not in KNOWN and value is not None:
                raise _bad(name, value, f"not known to this reader, which honours {', '.join(KNOWN)}")
            if value is not None and value not in HONOURED.get(name, (value,)):
                raise _bad(name, value, " or ".join(repr(choice) for choice in HONOURED[name]))
        block, static = _block(section.get("weight_block_size")), section.get("activation_scheme") == "static"
        if block is not None and static:
            raise _bad("activation_scheme", "static", "'dynamic' where weight_block_size is given")
        patterns = [_pattern(name, entry) for name in LISTS for entry in _names(name, section.get(name))]
        return cls(block=block, static=static, plain=tuple(patterns))

    def leaves_plain(self, layer: str) -> bool:
        """Whether the layer of this dotted name is not quantized.

        Raises:
            ConfigError: only some parts of it are not.
        """
        parent, _, last = layer.rpartition(".")
        parts = [f"{parent}.{part}" if parent else part for part in MERGED.get(last, (last,))]
        plain = [part for part in parts if self._lists(part)]
        if not plain and not self._lists(layer):
            return False
        if 0 < len(plain) < len(parts) and not self._lists(layer):
            raise ConfigError(
                f"quantization_config leaves {', '.join(plain)} plain, but not the other parts of {layer}, which are "
                f"computed as one; use a checkpoint that leaves out all of {', '.join(MERGED[last])} or none."
            )
        return True

    def _lists(self, name: str) -> bool:
        return any(pattern.search(name) for pattern in self.plain)


def _bad(name: str, value: object, wanted: str) -> ConfigError:
    return ConfigError(f"{name!r} in quantization_config of config.json is {value!r}; it must be {wanted}.")


def _block(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    sizes = tuple(value) if isinstance(value, list | tuple) else ()
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise _bad("weight_block_size", value, "two positive integers, or null for one scale per tensor")
    return sizes[0], sizes[1]


def _names(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(entry, str) and entry for entry in value):
        raise _bad(name, value, "a list of module names")
    return value


def _pattern(name: str, entry: str) -> re.Pattern[str]:
    """Finds what an entry stands for, as transformers reads it: from the start up to a dot, or the end of a name."""
    try:
        return re.compile(rf"^(?:{entry})(?:(?<=\.)|(?=\.|$))|{re.escape(entry)}$")
    except re.error as error:
        raise _bad(name, entry, f"module names or regular expressions ({error})") from error
