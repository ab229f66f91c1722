"""Which chip."""

from __future__ import annotations

from typing import Any

from dovetail.options import EngineOptions
from dovetail.plugins.manifest import PlatformManifest
from dovetail.plugins.registry import Entry, Registries, nearest
from dovetail.resolution.decision import Decision, load, named


def decide(options: EngineOptions, registries: Registries) -> Decision[PlatformManifest]:
    """The named platform if this machine has it, or else the available one of highest priority."""
    decision: Decision[PlatformManifest] = Decision(part="platform")
    auto = options.platform == "auto"
    candidates = (
        registries.platforms.ranked() if auto else named(registries.platforms, options.platform, decision)
    )
    for entry in candidates:
        if decision.entry is not None:
            decision.reject(entry, f"{decision.entry.name!r} comes first")
            continue
        cls = load(entry, "dovetail.contracts.platform:Platform", decision)
        if cls is None:
            continue
        probe = _probe(cls)
        if probe:
            decision.reject(entry, f"not available here: {probe}")
        else:
            decision.take(
                entry, cls, "available here, highest priority" if auto else "asked for with --platform"
            )
    if decision.entry is None:
        if auto and not candidates:
            decision.obstacles.append("No platform is registered; reinstall dovetail-core, which brings one.")
        decision.refuse_rejected("platform")
        if not auto and decision.rejected:
            what = decision.obstacles[-1].rstrip(".")
            decision.obstacles[-1] = f"{what}. Repair that, or leave out --platform to use what is available."
    return decision


def settings(options: EngineOptions, platform: Entry[PlatformManifest] | None) -> tuple[dict[str, Any], list[str]]:
    """The platform's own section, and what is wrong with it. Values are the platform's to judge."""
    given = options.platform_config or {}
    if platform is None:
        return {}, []
    known = platform.manifest.defaults
    unknown = [key for key in given if key not in known]
    obstacles = [
        f"--platform-config: platform {platform.name!r} of {platform.distribution} has no option {key!r}."
        f"{nearest(key, list(known))} Known: {', '.join(known) or 'none'}."
        for key in unknown
    ]
    return {**known, **given}, obstacles


def _probe(cls: Any) -> str:
    """Why the platform is not available; empty if it is."""
    try:
        probe = cls.probe()
        return "" if probe.available else probe.reason or "its probe gave no reason"
    except (Exception, SystemExit) as error:  # noqa: BLE001  a probe that raises is a platform that cannot be used
        return f"its probe raised {type(error).__name__}: {error}"
