"""Which attention backend."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dovetail.options import EngineOptions
from dovetail.plugins.manifest import AttentionManifest, PlatformManifest, SpecDecoderManifest
from dovetail.plugins.registry import Entry, Registries
from dovetail.resolution import needs
from dovetail.resolution.decision import Decision, either, load, misplaced, named

if TYPE_CHECKING:
    from dovetail.contracts.model import ModelFacts


def decide(
    options: EngineOptions,
    registries: Registries,
    platform: Entry[PlatformManifest] | None,
    facts: ModelFacts | None,
    dtype: str | None,
    max_model_len: int | None,
    speculator: Entry[SpecDecoderManifest] | None,
) -> Decision[AttentionManifest]:
    """The named backend if it can do what the others need, or else the platform's first that can."""
    decision: Decision[AttentionManifest] = Decision(part="attention")
    auto = options.attention == "auto"
    if auto:
        listed = () if platform is None else platform.manifest.attention
        candidates = [registries.attention.entries[name] for name in listed if name in registries.attention]
    else:
        listed = ()
        candidates = list(named(registries.attention, options.attention, decision))
    for entry in candidates:
        if decision.entry is not None:
            decision.reject(entry, f"{decision.entry.name!r} comes first")
            continue
        reasons = (
            *_setting_gaps(entry.manifest, options, platform, dtype, max_model_len),
            *need_gaps(entry.manifest, facts, speculator),
        )
        if reasons:
            decision.reject(entry, *reasons)
            continue
        cls = load(entry, "dovetail.contracts.attention:AttentionBackend", decision)
        if cls is not None:
            why = "the platform's first that supports the model" if auto else "asked for with --attention"
            decision.take(entry, cls, why)
    if decision.entry is None:
        decision.refuse_rejected("attention backend")
        if platform is not None and auto and not candidates:
            decision.obstacles.append(
                f"platform {platform.name!r} lists attention backends {', '.join(listed) or 'none'}, but "
                "none of them is registered; name one with --attention. "
                f"Registered: {', '.join(registries.attention.names()) or 'none'}."
            )
    if auto and platform is not None:
        for entry in registries.attention.ranked():
            if entry not in candidates:
                decision.reject(entry, "not among the platform's backends; ask for it with --attention")
    return decision


_OTHER = "choose another --attention"


def _setting_gaps(
    manifest: AttentionManifest,
    options: EngineOptions,
    platform: Entry[PlatformManifest] | None,
    dtype: str | None,
    max_model_len: int | None,
) -> Iterable[str]:
    """Settings that the backend cannot honour, each with what to change."""
    place = misplaced(manifest.device_types, platform)
    if place:
        yield f"{place}; {_OTHER}."
    if dtype is not None and dtype not in manifest.dtypes:
        yield f"does not accept {dtype}; choose --dtype {either(manifest.dtypes)}, or {_OTHER}."
    kv_dtype = options.kv_cache_dtype
    if kv_dtype not in manifest.kv_dtypes and not (kv_dtype == dtype and "auto" in manifest.kv_dtypes):
        choices = either(manifest.kv_dtypes)
        yield f"cannot store the KV cache as {kv_dtype}; choose --kv-cache-dtype {choices}, or {_OTHER}."
    if manifest.block_sizes and options.block_size not in manifest.block_sizes:
        choices = either(manifest.block_sizes)
        yield f"has no {options.block_size}-token blocks; choose --block-size {choices}, or {_OTHER}."
    limit = manifest.max_context
    if limit is not None and max_model_len is not None and max_model_len > limit:
        yield (
            f"attends to at most {limit} tokens, and a context of {max_model_len} is asked for; "
            f"choose --max-model-len {limit}, or {_OTHER}."
        )


def need_gaps(
    manifest: AttentionManifest, facts: ModelFacts | None, speculator: Entry[SpecDecoderManifest] | None
) -> Iterable[str]:
    """What the model or the speculator needs and the backend lacks, each with what to change."""
    if speculator is not None:
        for need in needs.lacking(manifest, speculator.manifest.needs):
            yield (
                f"lacks {need}, which speculative method {speculator.name!r} needs; "
                f"leave out --speculative-config, or {_OTHER}."
            )
    if facts is None:
        return
    sizes = sorted({spec.head_size for spec in facts.attention})
    unsupported = [size for size in sizes if manifest.head_sizes and size not in manifest.head_sizes]
    if unsupported:
        yield (
            f"has no head size {', '.join(map(str, unsupported))}, which the model needs "
            f"(it has {', '.join(map(str, manifest.head_sizes))}); {_OTHER}."
        )
    for need in needs.lacking(manifest, needs.of_model(facts)):
        yield f"lacks {need}, which the model needs; {_OTHER}."
