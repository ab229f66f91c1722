"""One part's decision: who was taken and why, who was not and why, and what stands in the way."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Generic, TypeVar

import msgspec

from dovetail.config import Rejected, Selection
from dovetail.errors import PluginLoadError, UnknownNameError
from dovetail.plugins.manifest import Manifest, PlatformManifest
from dovetail.plugins.registry import Entry, Registry

M = TypeVar("M", bound=Manifest)


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One part of the configuration.

    Attributes:
        part: ``"platform"``, ``"model"``, ``"attention"``, ``"quantization"`` or ``"speculation"``.
        chosen: what was taken, or None.
        plugin: the plugin that brings it.
        rejected: the other candidates.
    """

    part: str
    chosen: Selection | None
    plugin: str | None
    rejected: tuple[Rejected, ...]


@dataclass(kw_only=True, slots=True)
class Decision(Generic[M]):
    """One part while it is decided.

    Attributes:
        entry: the candidate taken, with its class and why.
        rejected: candidates and their reasons.
        broken: the rejected ones that could not even be imported.
        obstacles: why the whole request cannot be honoured.
    """

    part: str
    entry: Entry[M] | None = None
    loaded: Any = None
    why: str = ""
    rejected: list[tuple[Entry[M], tuple[str, ...]]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)

    def take(self, entry: Entry[M], loaded: Any, why: str) -> None:
        """Decide."""
        self.entry, self.loaded, self.why = entry, loaded, why

    def reject(self, entry: Entry[M], *reasons: str) -> None:
        """Note why a candidate was not taken."""
        self.rejected.append((entry, reasons))

    def refuse_rejected(self, headline: str) -> None:
        """Nobody was taken: turn every candidate's reasons into obstacles."""
        for entry, reasons in self.rejected:
            self.obstacles.extend(f"{headline} {entry.name!r} of {entry.owner}: {reason}" for reason in reasons)

    def selection(self) -> Selection:
        """The decision in the configuration's terms; only once it is taken."""
        assert self.entry is not None
        return Selection(
            name=self.entry.name,
            target=self.entry.target,
            distribution=self.entry.distribution,
            version=self.entry.version,
            why=self.why,
            plugin=self.entry.plugin,
            # by way of JSON, so that it is the same on the other side of a process boundary
            claims=msgspec.json.decode(msgspec.json.encode(self.entry.manifest, order="deterministic")),
        )

    def explained(self) -> Part:
        """The decision in the explanation's terms."""
        return Part(
            part=self.part,
            chosen=None if self.entry is None else self.selection(),
            plugin=None if self.entry is None else self.entry.plugin,
            rejected=tuple(
                Rejected(
                    name=entry.name, plugin=entry.plugin, distribution=entry.distribution, reasons=reasons
                )
                for entry, reasons in self.rejected
            ),
        )


def named(registry: Registry[M], name: str, decision: Decision[Any]) -> list[Entry[M]]:
    """The one candidate that the user named; an unknown name is an obstacle."""
    try:
        return [registry.get(name)]
    except UnknownNameError as error:
        decision.obstacles.append(str(error))
        return []


def load(entry: Entry[Any], contract: str, decision: Decision[Any]) -> Any:
    """The candidate's class, or None after rejecting it: it cannot be imported or breaks its contract."""
    module, _, name = contract.partition(":")
    base = getattr(import_module(module), name)
    who = f"{entry.name!r} of {entry.owner}"
    repair = f"Install a release of {entry.distribution} that repairs this, or report it to its authors."
    try:
        cls = entry.load()
    except PluginLoadError as error:
        problem = str(error).removeprefix(f"{who} ")
    else:
        if not (inspect.isclass(cls) and issubclass(cls, base)):
            problem = f"names {entry.target}, which is not a subclass of {module}.{name}. {repair}"
        elif inspect.isabstract(cls):
            missing = ", ".join(sorted(name for name in dir(cls) if _is_abstract(cls, name)))
            problem = f"names {entry.target}, which leaves methods of its contract undefined: {missing}. {repair}"
        else:
            return cls
    decision.reject(entry, problem)
    decision.broken.append(f"{who} {problem}")
    return None


def _is_abstract(cls: type, name: str) -> bool:
    return getattr(inspect.getattr_static(cls, name), "__isabstractmethod__", False) is True


def misplaced(device_types: tuple[str, ...], platform: Entry[PlatformManifest] | None) -> str:
    """That a part does not run on the platform's device, in words; empty if it does. No device types mean any."""
    if platform is None or not device_types or platform.manifest.device_type in device_types:
        return ""
    return f"runs on {', '.join(device_types)}, not on {platform.manifest.device_type} of platform {platform.name!r}"


_OFFERED = 6


def either(values: Iterable[object]) -> str:
    """The choices that a message offers; of many, the first few and the last."""
    words = [str(value) for value in values]
    if len(words) > _OFFERED:
        words[_OFFERED - 2 : -1] = ["…"]
    return " or ".join(words)
