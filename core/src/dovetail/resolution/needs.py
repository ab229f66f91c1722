"""Capabilities that one part needs of another, by the field of the manifest that declares them."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from dovetail.plugins.manifest import AttentionManifest, Manifest, QuantManifest

if TYPE_CHECKING:
    from dovetail.contracts.model import ModelFacts

OFFERING: tuple[type[Manifest], ...] = (AttentionManifest, QuantManifest)
"""Manifests whose switches are capabilities that a model may need."""


def switches(manifest: type[Manifest]) -> tuple[str, ...]:
    """The capabilities that manifests of this kind declare: their fields that are true or false."""
    return tuple(field.name for field in fields(manifest) if field.type in ("bool", bool))


def of_model(facts: ModelFacts) -> frozenset[str]:
    """What a checkpoint needs, whether it says so or its attention shows it."""
    needs = set(facts.needs)
    if any(spec.window is not None for spec in facts.attention):
        needs.add("sliding_window")
    if any(spec.soft_cap is not None for spec in facts.attention):
        needs.add("soft_cap")
    return frozenset(needs)


def lacking(manifest: Manifest, needs: frozenset[str]) -> list[str]:
    """The needs that a manifest of this kind could declare and this one does not, sorted."""
    return sorted(need for need in needs & set(switches(type(manifest))) if getattr(manifest, need) is not True)


def unknown(needs: frozenset[str]) -> list[str]:
    """The needs that no kind of part could ever meet, sorted."""
    known = {name for manifest in OFFERING for name in switches(manifest)}
    return sorted(needs - known)
