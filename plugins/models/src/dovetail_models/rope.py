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


def read_rope(fields: Fields, head_dim: int) -> Rope:
    """Parse the rotary section of a config.json.

    Raises:
        ConfigError: an unknown ``rope_type``, or a parameter of it that is missing or out of range.
    """
    if head_dim % 2:
        raise ConfigError(f"The head size is {head_dim}; rotary positions need an even one.")
    section = fields.section("rope_scaling") or fields.section("rope_parameters") or Fields({}, "rope_parameters")
    for owner in (section, fields):
        owner.choice("partial_rotary_factor", (1,), 1)
    for layer_type in ("full_attention", "sliding_attention"):
        if section.raw(layer_type) is not None:
            raise section.bad(layer_type, "absent: layers of this family share one table")
    name = "type" if section.raw("rope_type") is None else "rope_type"
    rope_type = section.choice(name, tuple(ROPE_TYPES), "default")
    base = section.number("rope_theta", fields.number("rope_theta", DEFAULT_THETA))
    return ROPE_TYPES[rope_type](fields, section, head_dim, base)


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
