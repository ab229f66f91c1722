"""Which speculator, and how it is set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dovetail.options import EngineOptions
from dovetail.plugins.manifest import PlatformManifest, SpecDecoderManifest
from dovetail.plugins.registry import Entry, Registries, nearest
from dovetail.resolution.decision import Decision, load, misplaced, named


def decide(
    options: EngineOptions, registries: Registries, platform: Entry[PlatformManifest] | None
) -> tuple[Decision[SpecDecoderManifest], int, dict[str, Any]]:
    """The speculator, its number of drafts, and its own section."""
    decision: Decision[SpecDecoderManifest] = Decision(part="speculation")
    given = options.speculative_config
    if given is None:
        return decision, 0, {}
    method = given.get("method")
    if not isinstance(method, str):
        known = ", ".join(registries.spec_decoders.names()) or "none"
        what = f"has method {method!r}" if "method" in given else "names no method"
        decision.obstacles.append(f"--speculative-config {what}; give one that is registered: {known}.")
        return decision, 0, {}
    for entry in named(registries.spec_decoders, method, decision):
        cls = load(entry, "dovetail.contracts.specdec:SpecDecoder", decision)
        if cls is not None:
            decision.take(entry, cls, "asked for with --speculative-config")
        section = {**entry.manifest.defaults, **{key: given[key] for key in given if key != "method"}}
        drafts = section.pop("num_speculative_tokens", None)
        decision.obstacles += _speculation_gaps(entry.manifest, section, drafts, options.max_num_batched_tokens)
        place = misplaced(entry.manifest.device_types, platform)
        if place:
            decision.obstacles.append(
                f"speculative method {entry.name!r} of {entry.distribution} {place}; leave out --speculative-config."
            )
        if cls is not None and not decision.obstacles:
            return decision, drafts, section
    decision.refuse_rejected("speculative method")
    return decision, 0, {}


def _speculation_gaps(
    manifest: SpecDecoderManifest, section: Mapping[str, Any], drafts: Any, most: int
) -> Iterable[str]:
    option = "--speculative-config"
    if not isinstance(drafts, int) or isinstance(drafts, bool) or drafts < 1:
        yield f"{option} has num_speculative_tokens {drafts!r}; give a whole number of at least 1."
    elif drafts > most:
        yield (
            f"{option} has num_speculative_tokens {drafts}, and a step computes at most --max-num-batched-tokens "
            f"{most} tokens; give fewer. A few per step are what pays."
        )
    known = [key for key in manifest.defaults if key != "num_speculative_tokens"]
    if manifest.needs_draft_model:
        known.append("model")
        model = section.get("model")
        if not isinstance(model, str) or not model:
            yield f'{option}: method {manifest.name!r} needs a draft model; add "model": PATH_OR_HUB_ID.'
    for key in section:
        if key not in known:
            everything = ["method", "num_speculative_tokens", *dict.fromkeys(known)]
            yield (
                f"{option}: method {manifest.name!r} has no option {key!r}.{nearest(key, everything)} "
                f"Known: {', '.join(everything)}."
            )
