"""Registries: everything that plugins registered, by kind and name, with its owner.

Filled once at start-up by the plugin host, then frozen. They hold manifests and lazy targets, never the
things themselves, so they cross process borders as bytes and importing this module imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, Generic, TypeVar

import msgspec

from dovetail.errors import PluginConflictError, PluginLoadError, UnknownNameError
from dovetail.plugins.manifest import (
    AttentionManifest,
    CommandManifest,
    Manifest,
    ModelManifest,
    PlatformManifest,
    QuantManifest,
    SpecDecoderManifest,
)
from dovetail.plugins.requirements import explain_unmet
from dovetail.plugins.target import import_target

M = TypeVar("M", bound=Manifest)


def owner(plugin: str, distribution: str, version: str) -> str:
    """Who is responsible, in the words of every message."""
    return f"plugin {plugin!r} ({distribution} {version})"


class Entry(msgspec.Struct, Generic[M], frozen=True, kw_only=True):
    """One registration.

    Attributes:
        manifest: what the plugin declared.
        target: ``"package.module:Attribute"``.
        plugin: the entry-point name of the plugin that registered it.
        distribution, version: who brings it.
    """

    manifest: M
    target: str
    plugin: str
    distribution: str
    version: str

    @property
    def name(self) -> str:
        """As registered."""
        return self.manifest.name

    @property
    def owner(self) -> str:
        """Plugin, distribution and version, in words."""
        return owner(self.plugin, self.distribution, self.version)

    def load(self) -> Any:
        """Import the target.

        Raises:
            PluginLoadError: something that it requires is not installed, the import failed, or the attribute does
                not exist; names the owner, the cause and what to do.
        """
        extra = self.manifest.extra
        gap = explain_unmet(self.manifest.requires, f"{self.distribution}[{extra}]" if extra else "")
        if gap:
            raise PluginLoadError(f"{self.name!r} of {self.owner} {gap}.")
        return import_target(self.target, self.name, self.owner, self.distribution)


class Registry(msgspec.Struct, Generic[M], kw_only=True):
    """What is registered of one kind.

    Attributes:
        kind: the noun of messages, e.g. ``"platform"``.
        entries: by name, in the order of registration.
        hints: sentences for a miss, about plugins that are broken or disabled.
        frozen: whether start-up is over.
    """

    kind: str
    entries: dict[str, Entry[M]] = {}
    hints: tuple[str, ...] = ()
    frozen: bool = False

    def add(self, entry: Entry[M]) -> None:
        """Add a registration.

        Raises:
            PluginConflictError: the name is taken; names both owners.
            PluginLoadError: the registry is frozen.
        """
        if self.frozen:
            raise PluginLoadError(
                f"{entry.owner} registers {self.kind} {entry.name!r} after start-up; do it inside the hook."
            )
        taken = self.entries.get(entry.name)
        if taken is not None:
            raise PluginConflictError(
                f"{self.kind} {entry.name!r} of {entry.owner} is already registered by {taken.owner}. "
                f"Rename one, or leave one plugin out with DOVETAIL_DISABLE_PLUGINS."
            )
        self.entries[entry.name] = entry

    def drop(self, entry: Entry[M]) -> None:
        """Take back a registration of a plugin that failed afterwards."""
        del self.entries[entry.name]

    def freeze(self, hints: tuple[str, ...] = ()) -> None:
        """End of start-up: refuse further registrations, and keep ``hints`` for misses."""
        self.frozen = True
        self.hints = hints

    def names(self) -> tuple[str, ...]:
        """Every registered name, sorted."""
        return tuple(sorted(self.entries))

    def get(self, name: str) -> Entry[M]:
        """Look up a name.

        Raises:
            UnknownNameError: with the nearest name, the known ones, and what else might provide it.
        """
        if name in self.entries:
            return self.entries[name]
        near = nearest(name, self.entries)
        known = ", ".join(self.names()) or "none"
        install = "Install the distribution that provides it; `dovetail plugins` lists what is installed."
        raise UnknownNameError(
            " ".join([f"No {self.kind} is named {name!r}.{near} Registered: {known}.", install, *self.hints])
        )

    def ranked(self) -> list[Entry[M]]:
        """Every entry, highest priority first; equals in the order of their names."""
        return sorted(self.entries.values(), key=lambda entry: (-entry.manifest.priority, entry.name))

    def __iter__(self) -> Iterator[Entry[M]]:
        return iter(self.entries.values())

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __len__(self) -> int:
        return len(self.entries)


class PluginStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one plugin.

    Attributes:
        name: its entry-point name.
        state: ``"loaded"``; ``"quarantined"``: it failed, nobody asked for it, and it is left out; ``"failed"``: it
            failed and was asked for, so that nothing starts; or ``"disabled"``.
        asked: whether ``DOVETAIL_PLUGINS`` names it.
        error: the cause in one line, if it failed.
        remedy: what to do about it, if it failed.
        traceback: the whole story, if it failed.
        provides: per kind, the names that it registered; a failed plugin's were dropped again.
        warnings: what is not right about a plugin that is loaded: a slow import, a contract version on its way out, a
            requirement that is not installed.
        seconds: that importing it and calling its hooks took.
    """

    name: str
    distribution: str
    version: str
    state: str
    asked: bool = False
    error: str | None = None
    remedy: str | None = None
    traceback: str | None = None
    provides: dict[str, tuple[str, ...]] = {}
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def owner(self) -> str:
        """Plugin, distribution and version, in words."""
        return owner(self.name, self.distribution, self.version)

    @property
    def broken(self) -> bool:
        """Whether it failed, asked for or not."""
        return self.state in ("quarantined", "failed")

    @property
    def well(self) -> bool:
        """Whether there is nothing to say about it."""
        return not self.broken and not self.warnings

    @property
    def failure(self) -> str:
        """Cause and remedy of a plugin that failed."""
        return " ".join(part for part in (self.error, self.remedy) if part)


class Registries(msgspec.Struct, kw_only=True):
    """One registry per kind, and the plugins behind them. Every process gets the parent's."""

    platforms: Registry[PlatformManifest] = msgspec.field(default_factory=lambda: Registry(kind="platform"))
    attention: Registry[AttentionManifest] = msgspec.field(
        default_factory=lambda: Registry(kind="attention backend")
    )
    models: Registry[ModelManifest] = msgspec.field(default_factory=lambda: Registry(kind="model family"))
    quant: Registry[QuantManifest] = msgspec.field(
        default_factory=lambda: Registry(kind="quantization method")
    )
    spec_decoders: Registry[SpecDecoderManifest] = msgspec.field(
        default_factory=lambda: Registry(kind="speculative method")
    )
    commands: Registry[CommandManifest] = msgspec.field(default_factory=lambda: Registry(kind="command"))
    plugins: tuple[PluginStatus, ...] = ()

    def by_kind(self) -> dict[str, Registry[Any]]:
        """The registries by field name."""
        return {
            "platforms": self.platforms,
            "attention": self.attention,
            "models": self.models,
            "quant": self.quant,
            "spec_decoders": self.spec_decoders,
            "commands": self.commands,
        }

    def freeze(self, plugins: tuple[PluginStatus, ...]) -> None:
        """End of start-up: record the plugins and refuse further registrations."""
        self.plugins = plugins
        for kind, registry in self.by_kind().items():
            registry.freeze(_hints(kind, plugins))

    def refuse_broken(self) -> None:
        """Stop if a plugin that was asked for is broken.

        Raises:
            PluginLoadError: names each, with cause and remedy.
        """
        lines = self.failures()
        if lines:
            raise PluginLoadError("\n".join(["Cannot start without plugins that were asked for:", *lines]))

    def failures(self) -> list[str]:
        """One line for each plugin that was asked for and failed."""
        return [
            f"DOVETAIL_PLUGINS names {plugin.owner}, which failed: {plugin.failure} "
            "`dovetail plugins` shows the details."
            for plugin in self.plugins
            if plugin.state == "failed"
        ]

    def encode(self) -> bytes:
        """For another process."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Registries:
        """The inverse of :meth:`encode`."""
        return msgspec.msgpack.decode(data, type=cls)


def nearest(name: str, known: Any) -> str:
    """``" Did you mean 'x'?"``, or nothing if no known name resembles ``name``."""
    near = get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _hints(kind: str, plugins: tuple[PluginStatus, ...]) -> tuple[str, ...]:
    """What to say on a miss about plugins that are installed but not loaded."""
    hints = []
    for plugin in plugins:
        if plugin.broken:
            lost = ", ".join(plugin.provides.get(kind, ()))
            what = f"would have registered {lost}" if lost else "might provide it"
            hints.append(f"The {plugin.owner} {what} but failed to load: {plugin.failure}")
    off = ", ".join(plugin.owner for plugin in plugins if plugin.state == "disabled")
    if off:
        hints.append(f"Installed but switched off, and might provide it: {off}.")
    return tuple(hints)
