"""Which number format the weights have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dovetail.errors import DovetailError
from dovetail.options import EngineOptions
from dovetail.plugins.manifest import PlatformManifest, QuantManifest
from dovetail.plugins.registry import Entry, Registries
from dovetail.plugins.remedy import one_line
from dovetail.resolution import needs
from dovetail.resolution.decision import Decision, either, load, misplaced, named

if TYPE_CHECKING:
    from dovetail.contracts.model import ModelFacts

PLAIN = "none"
"""The quantization method of plain weights."""


def decide(
    options: EngineOptions,
    registries: Registries,
    hf_config: Mapping[str, Any],
    dtype: str | None,
    platform: Entry[PlatformManifest] | None,
    facts: ModelFacts | None,
) -> Decision[QuantManifest]:
    """The method that reads the checkpoint's weights, or quantizes plain ones on load."""
    decision: Decision[QuantManifest] = Decision(part="quantization")
    section = hf_config.get("quantization_config")
    if section is not None and not isinstance(section, Mapping):
        decision.obstacles.append(f"config.json has {_brief(section)}; it must be an object with a quant_method.")
        return decision
    method = None if section is None else section.get("quant_method")
    if options.quantization is not None:
        why = "asked for with --quantization"
        candidates = named(registries.quant, options.quantization, decision)
    elif section is None:
        why = "the checkpoint's weights are plain"
        candidates = named(registries.quant, PLAIN, decision)
    else:
        why = "recognises the checkpoint's quantization_config"
        candidates = [e for e in registries.quant.ranked() if method in e.manifest.checkpoint_methods]
        if not candidates:
            hints = " ".join(registries.quant.hints)
            decision.obstacles.append(
                f"The checkpoint is quantized with {method!r}, which no installed plugin can read. "
                f"Install the distribution that brings it, or use an unquantized checkpoint. {hints}".rstrip()
            )
    for entry in candidates:
        if decision.entry is not None:
            decision.reject(entry, f"{decision.entry.name!r} comes first")
            continue
        gaps = (
            *_format_gaps(entry.manifest, section, method),
            *_setting_gaps(entry.manifest, dtype, platform, facts),
        )
        if gaps:
            decision.reject(entry, *gaps)
            continue
        cls = load(entry, "dovetail.contracts.quant:QuantMethod", decision)
        if cls is None:
            continue
        refusal = "" if section is None else _refusal(cls, section)
        if refusal:
            decision.reject(entry, refusal)
        else:
            decision.take(entry, cls, why)
    if decision.entry is None:
        decision.refuse_rejected("quantization method")
    return decision


def _format_gaps(manifest: QuantManifest, section: Any, method: Any) -> Iterable[str]:
    """Why a method does not fit the checkpoint's weights, judged by its manifest."""
    if section is None and manifest.name != PLAIN and not manifest.on_load:
        yield (
            "cannot quantize while loading, and this checkpoint is unquantized; leave out --quantization, or "
            "name a checkpoint in this format."
        )
    if section is not None and method not in manifest.checkpoint_methods:
        yield f"cannot read this checkpoint, which is quantized with {method!r}; leave out --quantization."


def _setting_gaps(
    manifest: QuantManifest, dtype: str | None, platform: Entry[PlatformManifest] | None, facts: ModelFacts | None
) -> Iterable[str]:
    """What the other parts need and a method lacks, judged by its manifest."""
    if dtype is not None and manifest.dtypes and dtype not in manifest.dtypes:
        yield f"does not work with activations in {dtype}; choose --dtype {either(manifest.dtypes)}."
    place = misplaced(manifest.device_types, platform)
    if place:
        yield f"{place}; choose another --quantization or --platform."
    for need in () if facts is None else needs.lacking(manifest, needs.of_model(facts)):
        yield f"lacks {need}, which the model needs; choose another --quantization, or a checkpoint without."
    from dovetail.contracts.ops import OpTable

    unknown = sorted(manifest.ops - OpTable.names())
    if unknown:
        yield f"needs operations that this core lacks: {', '.join(unknown)}; install matching releases."


def _refusal(cls: Any, section: Mapping[str, Any]) -> str:
    """Why a method does not read the checkpoint's section, by its own account; empty if it does."""
    try:
        return "" if cls.recognises(section) else f"does not recognise the checkpoint's {_brief(section)}."
    except DovetailError as error:
        return str(error)
    except (Exception, SystemExit) as error:  # noqa: BLE001  the method cannot read this section
        return f"cannot read the checkpoint's {_brief(section)}: {one_line(error)}"


def _brief(section: Any) -> str:
    text = f"quantization_config {section!r}"
    return text if len(text) <= 120 else text[:117] + "..."
