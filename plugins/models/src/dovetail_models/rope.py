"""Rotary positions as checkpoints describe them.

Newer files have ``rope_parameters``, older ones ``rope_scaling`` and ``rope_theta``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.errors import ConfigError
from dovetail.layers.rotary import (
    banded_frequencies,
    frequencies,
    rotary_table,
    yarn_frequencies,
    yarn_magnitude,
)
from dovetail_models.fields import Fields

DEFAULT_THETA = 10000.0
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """A checkpoint's rotary positions.

    Attributes:
        frequencies_K: angle per position of each pair of elements.
        magnitude: factor on cosines and sines.
        max_positions: longest context that they are good for.
    """

    frequencies_K: Tensor
    magnitude: float = 1.0
    max_positions: int

    def table(self, positions: int, device: torch.device) -> Tensor:
        """Float32 ``[positions, K]`` for the first positions."""
        return rotary_table(self.frequencies_K, positions, device, self.magnitude)


def read_rope(fields: Fields, head_dim: int, *, theta: float = DEFAULT_THETA) -> Rope:
    """Parse the rotary section of a config.json; ``theta`` is the family's default base.

    Raises:
        ConfigError: an unknown ``rope_type``, or a parameter of it that is missing or out of range.
    """
    section = fields.section("rope_scaling") or fields.section("rope_parameters") or Fields({}, "rope_parameters")
    for layer_type in LAYER_TYPES:
        if section.raw(layer_type) is not None:
            raise section.bad(layer_type, "absent: layers of this family share one table")
    return _read_section(fields, section, head_dim, fields.number("rope_theta", theta))


def read_layer_ropes(fields: Fields, head_dim: int, *, full: float, sliding: float) -> tuple[Rope, Rope]:
    """Parse the rotary sections of layers that see everything, and of those that slide.

    Newer files have both in ``rope_parameters``. In older ones ``rope_theta`` and ``rope_scaling`` are of the former,
    and ``rope_local_base_freq`` is the base of the latter.

    Args:
        full, sliding: the family's default bases.

    Raises:
        ConfigError: as for :func:`read_rope`; or ``rope_parameters`` is not by layer type.
    """
    both = fields.section("rope_parameters") or Fields({}, "rope_parameters")
    if not both.names() <= set(LAYER_TYPES):
        raise fields.bad("rope_parameters", f"an object of {' and '.join(LAYER_TYPES)}")
    nothing = Fields({}, "rope_parameters")
    full_section = fields.section("rope_scaling") or both.section("full_attention") or nothing
    sliding_section = both.section("sliding_attention") or nothing
    return (
        _read_section(fields, full_section, head_dim, fields.number("rope_theta", full)),
        _read_section(fields, sliding_section, head_dim, fields.number("rope_local_base_freq", sliding)),
    )


def _read_section(fields: Fields, section: Fields, head_dim: int, theta: float) -> Rope:
    if head_dim % 2:
        raise ConfigError(f"The head size is {head_dim}; rotary positions need an even one.")
    for owner in (section, fields):
        owner.choice("partial_rotary_factor", (1,), 1)
    name = "type" if section.raw("rope_type") is None else "rope_type"
    rope_type = section.choice(name, tuple(ROPE_TYPES), "default")
    return ROPE_TYPES[rope_type](fields, section, head_dim, section.number("rope_theta", theta))


def _default(fields: Fields, section: Fields, head_dim: int, base: float) -> Rope:
    # "dynamic" comes here too: it leaves the frequencies alone up to max_position_embeddings, which bounds the context.
    positions = fields.integer("max_position_embeddings")
    return Rope(frequencies_K=frequencies(head_dim, base), max_positions=positions)


def _linear(fields: Fields, section: Fields, head_dim: int, base: float) -> Rope:
    positions = fields.integer("max_position_embeddings")
    return Rope(frequencies_K=frequencies(head_dim, base) / section.number("factor"), max_positions=positions)


def _llama3(fields: Fields, section: Fields, head_dim: int, base: float) -> Rope:
    banded = banded_frequencies(
        head_dim,
        base,
        factor=section.number("factor"),
        low=section.number("low_freq_factor"),
        high=section.number("high_freq_factor"),
        original_positions=_original_positions(fields, section),
    )
    return Rope(frequencies_K=banded, max_positions=fields.integer("max_position_embeddings"))


def _yarn(fields: Fields, section: Fields, head_dim: int, base: float) -> Rope:
    positions = fields.integer("max_position_embeddings")
    original = _original_positions(fields, section)
    factor = section.number("factor", positions / original)
    stretched = yarn_frequencies(
        head_dim,
        base,
        factor=factor,
        original_positions=original,
        fast=section.number("beta_fast", 32.0),
        slow=section.number("beta_slow", 1.0),
        truncate=section.switch("truncate", True),
    )
    magnitude = yarn_magnitude(factor)
    if section.raw("mscale") and section.raw("mscale_all_dim"):
        magnitude = yarn_magnitude(factor, section.number("mscale")) / yarn_magnitude(
            factor, section.number("mscale_all_dim")
        )
    return Rope(
        frequencies_K=stretched,
        magnitude=section.number("attention_factor", magnitude),
        max_positions=max(positions, int(original * factor)),
    )


def _original_positions(fields: Fields, section: Fields) -> int:
    name = "original_max_position_embeddings"
    return fields.integer(name, section.integer(name, fields.integer("max_position_embeddings")))


ROPE_TYPES: dict[str, Callable[[Fields, Fields, int, float], Rope]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _default,
    "llama3": _llama3,
    "yarn": _yarn,
}
