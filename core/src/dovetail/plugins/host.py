"""The plugin host: finds installed plugins, loads each on its own, and freezes what they register.

A plugin is an entry point of group ``dovetail``. One that fails never takes another down: its failure is
recorded with plugin, distribution, version and traceback, and nothing that it registered is kept.

``DOVETAIL_PLUGINS`` and ``DOVETAIL_DISABLE_PLUGINS`` act before import. The core's own plugin, ``builtin``,
is always loaded: it holds the reference implementations that everything else is measured against.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

import msgspec
import pluggy

from dovetail import env, hookspecs
from dovetail.contracts import API_VERSIONS
from dovetail.errors import ConfigError, PluginConflictError, PluginLoadError
from dovetail.plugins.manifest import (
    AttentionManifest,
    Manifest,
    ModelManifest,
    PlatformManifest,
    QuantManifest,
    SpecDecoderManifest,
)
from dovetail.plugins.registry import Entry, PluginStatus, Registries, nearest

GROUP = "dovetail"
BUILTIN = "builtin"

_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")

_logger = logging.getLogger("dovetail.plugins")
_warned: set[tuple[str, str]] = set()


class Hook(msgspec.Struct, frozen=True):
    """One registration hook: which registry it fills, with which manifests, of which contract."""

    name: str
    kind: str
    manifest: type[Manifest]
    contract: str


HOOKS = (
    Hook("dovetail_register_platforms", "platforms", PlatformManifest, "platform"),
    Hook("dovetail_register_attention_backends", "attention", AttentionManifest, "attention"),
    Hook("dovetail_register_models", "models", ModelManifest, "model"),
    Hook("dovetail_register_quant_methods", "quant", QuantManifest, "quant"),
    Hook("dovetail_register_spec_decoders", "spec_decoders", SpecDecoderManifest, "specdec"),
)


class Discovery(msgspec.Struct, frozen=True):
    """The outcome of start-up: what is registered, and what became of each plugin."""

    registries: Registries
    plugins: tuple[PluginStatus, ...]


class PluginHost:
    """Discovers plugins, once per process that needs to.

    Args:
        allow: entry-point names to load, besides ``builtin``; None reads ``DOVETAIL_PLUGINS``, else all.
        disable: entry-point names not to import; None reads ``DOVETAIL_DISABLE_PLUGINS``.
        trace: print every hook call to stderr; None reads ``DOVETAIL_TRACE_HOOKS``.

    Raises:
        ConfigError: ``DOVETAIL_TRACE_HOOKS`` is neither 0 nor 1.
    """

    def __init__(
        self,
        *,
        allow: Sequence[str] | None = None,
        disable: Sequence[str] | None = None,
        trace: bool | None = None,
    ) -> None:
        self._allow = env.names("DOVETAIL_PLUGINS") if allow is None else tuple(allow)
        self._disable = (env.names("DOVETAIL_DISABLE_PLUGINS") or ()) if disable is None else tuple(disable)
        self._trace = env.switch("DOVETAIL_TRACE_HOOKS") if trace is None else trace

    def discover(self, *, warn: bool = True) -> Discovery:
        """Load every plugin that is allowed, and freeze the registries.

        Never raises for a broken plugin; the resolver refuses to start if it was asked for.

        Args:
            warn: log one warning per broken plugin that nobody asked for, once per process.

        Raises:
            ConfigError: the allow or disable list names a plugin that is not installed.
        """
        points = sorted(entry_points(group=GROUP), key=lambda point: (point.name != BUILTIN, point.name))
        self._check_lists([point.name for point in points])
        registries = Registries()
        statuses: list[PluginStatus] = []
        for point in points:
            earlier = next((s for s in statuses if s.name == point.name), None)
            statuses.append(self._load(point, registries, earlier))
        registries.freeze(tuple(statuses))
        if warn:
            _warn_once(statuses)
        return Discovery(registries, registries.plugins)

    def _check_lists(self, installed: Sequence[str]) -> None:
        for variable, given in (
            ("DOVETAIL_PLUGINS", self._allow or ()),
            ("DOVETAIL_DISABLE_PLUGINS", self._disable),
        ):
            for name in given:
                if name not in installed:
                    raise ConfigError(
                        f"{variable} names {name!r}, but no such plugin is installed."
                        f"{nearest(name, installed)} Installed: {', '.join(sorted(installed)) or 'none'}."
                    )
        for name in self._disable:
            if name in (self._allow or ()):
                raise ConfigError(
                    f"DOVETAIL_PLUGINS and DOVETAIL_DISABLE_PLUGINS both name {name!r}; take it off one."
                )
        if BUILTIN in self._disable:
            raise ConfigError(
                f"DOVETAIL_DISABLE_PLUGINS names {BUILTIN!r}, which cannot be switched off; remove it."
            )

    def _load(self, point: EntryPoint, registries: Registries, earlier: PluginStatus | None) -> PluginStatus:
        distribution, version = _origin(point)
        asked = point.name in (self._allow or ())

        def status(
            state: str, staged: Iterable[tuple[Hook, Entry[Any]]] = (), **details: str
        ) -> PluginStatus:
            return PluginStatus(
                name=point.name,
                distribution=distribution,
                version=version,
                state=state,
                asked=asked,
                provides=_provides(staged),
                **details,
            )

        allowed = self._allow is None or asked or point.name == BUILTIN
        if not allowed or point.name in self._disable:
            return status("disabled")
        staged: list[tuple[Hook, Entry[Any]]] = []
        try:
            if earlier is not None:
                raise PluginConflictError(
                    f"Two installed distributions call a plugin {point.name!r}: {earlier.distribution} and "
                    f"{distribution}. Uninstall one."
                )
            self._call_hooks(point, registries, distribution, version, staged)
        except (Exception, SystemExit) as error:  # noqa: BLE001  whatever a plugin raises is its own failure
            for hook, entry in staged:
                registries.by_kind()[hook.kind].drop(entry)
            return status("failed", staged, error=_one_line(error), traceback=traceback.format_exc())
        return status("loaded", staged)

    def _call_hooks(
        self,
        point: EntryPoint,
        registries: Registries,
        distribution: str,
        version: str,
        staged: list[tuple[Hook, Entry[Any]]],
    ) -> None:
        """Import one plugin and call its hooks, in a plugin manager of its own; fills ``staged``."""
        module = point.load()
        _check_functions(module)
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        manager.register(module, point.name)
        manager.check_pending()
        if self._trace:
            _trace(manager, point.name)
        for hook in HOOKS:

            def register(manifest: Manifest, target: str, hook: Hook = hook) -> None:
                entry: Entry[Any] = Entry(
                    manifest=manifest,
                    target=target,
                    plugin=point.name,
                    distribution=distribution,
                    version=version,
                )
                _check_registration(hook, entry)
                registries.by_kind()[hook.kind].add(entry)
                staged.append((hook, entry))
                if self._trace:
                    _say(f"{point.name}: + {hook.kind} {manifest.name} -> {target}")

            getattr(manager.hook, hook.name)(register=register)


def _origin(point: EntryPoint) -> tuple[str, str]:
    if point.dist is None:
        return "(unknown distribution)", "?"
    return point.dist.name, point.dist.version


def _provides(staged: Iterable[tuple[Hook, Entry[Any]]]) -> dict[str, tuple[str, ...]]:
    provides: dict[str, tuple[str, ...]] = {}
    for hook, entry in staged:
        provides[hook.kind] = (*provides.get(hook.kind, ()), entry.name)
    return provides


def _one_line(error: BaseException) -> str:
    text = " ".join(line.strip() for line in str(error).splitlines()).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _check_functions(module: Any) -> None:
    """Refuse functions that look like hooks and would never be called.

    Raises:
        PluginLoadError: a function's name begins like a hook's but is none, or it lacks ``@hookimpl``.
    """
    if not isinstance(module, ModuleType):
        raise PluginLoadError(
            f"The entry point names {module!r}; it must name a module, without an attribute."
        )
    known = [hook.name for hook in HOOKS]
    for name, function in vars(module).items():
        if not name.startswith("dovetail_") or not inspect.isfunction(function):
            continue
        if name not in known:
            raise PluginLoadError(f"{name} is not a hook.{nearest(name, known)} Hooks: {', '.join(known)}.")
        if not hasattr(function, f"{hookspecs.PROJECT}_impl"):
            raise PluginLoadError(f"{name} lacks @dovetail.hookimpl, so it would never be called; add it.")


def _check_registration(hook: Hook, entry: Entry[Any]) -> None:
    manifest, target = entry.manifest, entry.target
    if not isinstance(manifest, hook.manifest):
        raise PluginLoadError(
            f"{hook.name} registers {manifest!r}; it must be a {hook.manifest.__name__}."
        )
    if not isinstance(manifest.name, str) or not _NAME.fullmatch(manifest.name):
        raise PluginLoadError(
            f"{hook.name} registers the name {manifest.name!r}; use letters, digits and . _ + - only."
        )
    if not isinstance(target, str) or not _TARGET.fullmatch(target):
        raise PluginLoadError(
            f"{hook.name} registers {manifest.name!r} with target {target!r}; "
            "write it as 'package.module:Attribute'."
        )
    speaks = API_VERSIONS[hook.contract]
    if manifest.api != speaks:
        raise PluginLoadError(
            f"{hook.name} registers {manifest.name!r} for version {manifest.api} of the {hook.contract} "
            f"contract; this core speaks version {speaks}. "
            f"Install a release of {entry.distribution} made for it."
        )


def _trace(manager: pluggy.PluginManager, plugin: str) -> None:
    def before(hook: str, impls: Sequence[Any], arguments: Mapping[str, Any]) -> None:
        if impls:
            _say(f"{plugin}: {hook}({', '.join(arguments)})")

    after: Callable[..., None] = lambda *_: None  # noqa: E731
    manager.add_hookcall_monitoring(before, after)


def _say(line: str) -> None:
    print(f"dovetail hook: {line}", file=sys.stderr)  # noqa: T201


def _warn_once(statuses: Iterable[PluginStatus]) -> None:
    for status in statuses:
        key = (status.name, status.error or "")
        if status.state == "failed" and not status.asked and key not in _warned:
            _warned.add(key)
            _logger.warning(
                "The %s failed to load and is left out: %s `dovetail plugins` shows the details.",
                status.owner,
                status.error,
            )
