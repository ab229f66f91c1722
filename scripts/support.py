"""The support matrix: what the plugins of this repository declare, and which declarations fit each other."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from dovetail.contracts.ops import OpTable
from dovetail.plugins.host import GROUP, PluginHost
from dovetail.plugins.manifest import AttentionManifest, Manifest, PlatformManifest
from dovetail.plugins.registry import Entry, Registries, Registry
from dovetail.resolution import needs

ROOT = Path(__file__).parents[1]
DTYPES = ("bfloat16", "float16", "float32")
INTRO = """
What the plugins of this repository declare. The resolver reads the same declarations: `dovetail explain` tells what
fits on a machine, with whatever else is installed there, and what is not declared is refused. The fields are in
[hooks.md](hooks.md), the operations in [ops.md](ops.md).
"""
Table = Callable[[tuple[str, ...], Iterable[list[str]]], str]


def page(notice: str, table: Table) -> str:
    """The whole page; ``table`` makes markdown of a head and rows."""
    found = registries()
    sections = {
        "Platforms": platforms(found, table),
        "Attention backends": backends(found, table),
        "Platforms × attention × dtypes": combinations(found, table),
        "Number formats": formats(found, table),
        "Speculators": speculators(found, table),
        "Model families": families(found, table),
        "Commands": table(("command", "what"), [named(entry) for entry in found.commands]),
    }
    return "\n".join([notice, "# Support\n", INTRO.strip() + "\n", *(f"## {k}\n\n{v}" for k, v in sections.items())])


def registries() -> Registries:
    """What the plugins of this repository register, whatever else is installed."""
    files = [ROOT / "core/pyproject.toml", *sorted(ROOT.glob("plugins/*/pyproject.toml"))]
    projects = [tomllib.loads(file.read_text(encoding="utf-8"))["project"] for file in files]
    names = [name for project in projects for name in project["entry-points"][GROUP]]
    discovery = PluginHost(allow=names, disable=(), trace=False).discover(warn=False)
    discovery.registries.refuse_broken()
    return discovery.registries


def platforms(found: Registries, table: Table) -> str:
    """Every platform."""
    rows = [
        [
            *named(entry),
            code([entry.manifest.device_type]),
            code(entry.manifest.dtypes),
            code(entry.manifest.attention),
            code(entry.manifest.kv_dtypes, "what the backend stores"),
            limit(entry.manifest.max_context),
            f"{len(entry.manifest.ops)} of {len(fields(OpTable))}",
        ]
        for entry in found.platforms
    ]
    head = ("platform", "what", "device", "dtypes", "attention, in order", "KV cache", "context", "own operations")
    return table(head, rows)


def backends(found: Registries, table: Table) -> str:
    """Every attention backend with its capabilities."""
    able = needs.switches(AttentionManifest)
    rows = [
        [
            *named(entry),
            code(on(found.platforms, entry.manifest.device_types)),
            code(entry.manifest.kv_dtypes),
            sizes(entry.manifest.block_sizes),
            sizes(entry.manifest.head_sizes),
            limit(entry.manifest.max_context),
            *(mark(getattr(entry.manifest, name)) for name in able),
        ]
        for entry in found.attention
    ]
    head = ("backend", "what", "platforms", "KV cache", "block sizes", "head sizes", "context", *able)
    return table(head, rows)


def combinations(found: Registries, table: Table) -> str:
    """Which backend runs where, in which activation dtype; the platform's first that fits is the default."""
    rows = []
    for chip in found.platforms:
        for backend in found.attention:
            if chip.manifest.device_type in backend.manifest.device_types:
                fits = [mark(_runs(chip.manifest, backend.manifest, dtype)) for dtype in DTYPES]
                listed = backend.name in chip.manifest.attention
                rows.append([f"`{chip.name}`", f"`{backend.name}`", "auto" if listed else "by name", *fits])
    return table(("platform", "attention", "chosen", *DTYPES), rows)


def _runs(chip: PlatformManifest, backend: AttentionManifest, dtype: str) -> bool:
    return dtype in chip.dtypes and dtype in backend.dtypes


def formats(found: Registries, table: Table) -> str:
    """Every number format of weights."""
    rows = [
        [
            *named(entry),
            code(entry.manifest.checkpoint_methods, "–"),
            mark(entry.manifest.on_load),
            code(entry.manifest.dtypes, "any"),
            code(on(found.platforms, entry.manifest.device_types)),
            mark(entry.manifest.experts),
            code(sorted(entry.manifest.ops), "–"),
        ]
        for entry in found.quant
    ]
    head = ("method", "what", "checkpoints", "on load", "dtypes", "platforms", "experts", "operations it needs")
    return table(head, rows)


def speculators(found: Registries, table: Table) -> str:
    """Every speculator, and the backends that can verify for it."""
    rows = [
        [
            *named(entry),
            mark(entry.manifest.needs_draft_model),
            mark(entry.manifest.probabilities),
            code(on(found.platforms, entry.manifest.device_types)),
            code(sorted(entry.manifest.needs), "–"),
            code([b.name for b in found.attention if not needs.lacking(b.manifest, entry.manifest.needs)], "none"),
        ]
        for entry in found.spec_decoders
    ]
    head = ("method", "what", "draft model", "probabilities", "platforms", "needs of attention", "attention with that")
    return table(head, rows) if rows else "None yet.\n"


def families(found: Registries, table: Table) -> str:
    """Every model family."""
    rows = [
        [
            *named(entry),
            code(entry.manifest.architectures),
            code(entry.manifest.dtypes, "any"),
            "all" if entry.manifest.platform is None else code([entry.manifest.platform]),
        ]
        for entry in found.models
    ]
    return table(("family", "what", "architectures", "dtypes", "platforms"), rows)


def named(entry: Entry[Any]) -> list[str]:
    """Name, and summary with the distribution."""
    manifest: Manifest = entry.manifest
    return [f"`{entry.name}`", f"{manifest.summary} ({entry.distribution})"]


def on(chips: Registry[PlatformManifest], device_types: tuple[str, ...]) -> list[str]:
    """The platforms of these device types; none given means all."""
    return [chip.name for chip in chips if not device_types or chip.manifest.device_type in device_types]


def code(words: Iterable[str], empty: str = "none") -> str:
    """Words as code."""
    return ", ".join(f"`{word}`" for word in words) or empty


def sizes(values: tuple[int, ...]) -> str:
    """A list of sizes; a regular one by its ends."""
    steps = {after - before for before, after in pairwise(values)}
    if len(values) > 4 and len(steps) == 1:
        return f"{values[0]}, {values[1]}, …, {values[-1]}"
    return ", ".join(map(str, values)) or "any"


def limit(value: int | None) -> str:
    """A bound, or none."""
    return "any" if value is None else str(value)


def mark(value: bool) -> str:
    """A capability."""
    return "yes" if value else "–"
