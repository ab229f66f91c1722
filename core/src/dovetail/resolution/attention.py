"""Which attention backend."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dovetail.options import EngineOptions
from dovetail.plugins.manifest import AttentionManifest, PlatformManifest
from dovetail.plugins.registry import Entry, Registries
from dovetail.resolution.decision import Decision, either, load, named

if TYPE_CHECKING:
    from dovetail.contracts.model import ModelFacts


def decide(
    options: EngineOptions,
    registries: Registries,
    platform: Entry[PlatformManifest] | None,
    facts: ModelFacts | None,
    dtype: str | None,
) -> Decision[AttentionManifest]:
    """The named backend if it can do what the model needs, or else the platform's first that can."""
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
        reasons = tuple(_attention_gaps(entry.manifest, options, platform, facts, dtype))
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


def _attention_gaps(
    manifest: AttentionManifest,
    options: EngineOptions,
    platform: Entry[PlatformManifest] | None,
    facts: ModelFacts | None,
    dtype: str | None,
) -> Iterable[str]:
    """What is asked for and the backend cannot do, each with what to change."""
    other = "choose another --attention"
    if platform is not None and platform.manifest.device_type not in manifest.device_types:
        yield (
            f"runs on {', '.join(manifest.device_types)}, not on {platform.manifest.device_type} of platform "
            f"{platform.name!r}; {other}."
        )
    if dtype is not None and dtype not in manifest.dtypes:
        yield f"does not accept {dtype}; choose --dtype {either(manifest.dtypes)}, or {other}."
    kv_dtype = options.kv_cache_dtype
    if kv_dtype not in manifest.kv_dtypes and not (kv_dtype == dtype and "auto" in manifest.kv_dtypes):
        choices = either(manifest.kv_dtypes)
        yield f"cannot store the KV cache as {kv_dtype}; choose --kv-cache-dtype {choices}, or {other}."
    if manifest.block_sizes and options.block_size not in manifest.block_sizes:
        choices = either(manifest.block_sizes)
        yield f"has no {options.block_size}-token blocks; choose --block-size {choices}, or {other}."
    if options.speculative_config is not None and not manifest.verify:
        yield f"cannot verify drafts; leave out --speculative-config, or {other}."
    if facts is None:
        return
    sizes = sorted({spec.head_size for spec in facts.attention})
    unsupported = [size for size in sizes if manifest.head_sizes and size not in manifest.head_sizes]
    if unsupported:
        yield (
            f"has no head size {', '.join(map(str, unsupported))}, which the model needs "
            f"(it has {', '.join(map(str, manifest.head_sizes))}); {other}."
        )
    needs = set(facts.needs)
    if any(spec.window is not None for spec in facts.attention):
        needs.add("sliding_window")
    if any(spec.soft_cap is not None for spec in facts.attention):
        needs.add("soft_cap")
    for need in sorted(needs):
        if getattr(manifest, need, False) is not True:
            yield f"lacks {need}, which the model needs; {other}."
