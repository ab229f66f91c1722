"""The plugin host: finds installed plugins, loads each on its own, and freezes what they register.

A plugin is an entry point of group ``dovetail``. One that fails never takes another down: its failure is
recorded with plugin, distribution, version and traceback, and nothing that it registered is kept.

``DOVETAIL_PLUGINS`` and ``DOVETAIL_DISABLE_PLUGINS`` act before import. The core's own plugin, ``builtin``,
is always loaded: it holds the reference implementations that everything else is measured against.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import msgspec
import pluggy

from dovetail import deprecations, env, hookspecs
from dovetail.contracts import API_VERSIONS
from dovetail.errors import ConfigError, PluginConflictError
from dovetail.plugins import remedy
from dovetail.plugins.light_import import light_imports, slowness, watched
from dovetail.plugins.manifest import Manifest
from dovetail.plugins.registration import HOOKS, Hook, check_functions, check_registration, read_manifest
from dovetail.plugins.registry import Entry, PluginStatus, Registries, nearest
from dovetail.plugins.requirements import explain_unmet

GROUP = "dovetail"
BUILTIN = "builtin"
BUILTIN_MODULE = "dovetail.plugins.builtin"
"""What that entry point names: whoever else takes its name comes too late."""

_logger = logging.getLogger("dovetail.plugins")
_warned: set[tuple[str, str]] = set()


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
        points = sorted(entry_points(group=GROUP), key=lambda point: (point.value != BUILTIN_MODULE, point.name))
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
        asked = point.name in (self._allow or ())
        distribution, version = _origin(point)
        status = PluginStatus(
            name=point.name, distribution=distribution, version=version, state="loaded", asked=asked
        )
        allowed = self._allow is None or asked or point.name == BUILTIN
        if not allowed or point.name in self._disable:
            return msgspec.structs.replace(status, state="disabled")
        loading = _Loading(point, status, registries, trace=self._trace)
        begin = time.perf_counter()
        try:
            if earlier is not None:
                raise PluginConflictError(
                    f"Two installed distributions call a plugin {point.name!r}: {earlier.distribution} and "
                    f"{distribution}. Uninstall one."
                )
            loading.call_hooks()
        except (Exception, SystemExit) as error:  # noqa: BLE001  whatever a plugin raises is its own failure
            return loading.failed(error, time.perf_counter() - begin)
        return loading.succeeded(time.perf_counter() - begin)


class _Loading:
    """One plugin while it is loaded.

    Args:
        status: what is known beforehand.
        trace: print its hook calls and registrations.
    """

    def __init__(self, point: EntryPoint, status: PluginStatus, registries: Registries, *, trace: bool) -> None:
        self._point = point
        self._status = status
        self._registries = registries
        self._trace = trace
        self._staged: list[tuple[Hook, Entry[Any]]] = []
        self._hooks: list[str] = []

    def call_hooks(self) -> None:
        """Import the plugin and call its hooks, in a plugin manager of its own.

        Raises:
            Exception: whatever is wrong with it.
        """
        name = self._point.name
        with watched(self._status.owner, name), light_imports():
            module = self._point.load()
            self._hooks = check_functions(module)
            manager = pluggy.PluginManager(hookspecs.PROJECT)
            manager.add_hookspecs(hookspecs)
            manager.register(module, name)
            manager.check_pending()
            if self._trace:
                _trace(manager, name)
            for hook in HOOKS:
                getattr(manager.hook, hook.name)(register=self._register_for(hook))

    def failed(self, error: BaseException, seconds: float) -> PluginStatus:
        """Take back what it registered, and say what went wrong."""
        for hook, entry in self._staged:
            self._registries.by_kind()[hook.kind].drop(entry)
        status = self._status
        cure = remedy.for_exception(error, status.distribution, self._point.module)
        way_out = (
            "Or take it off DOVETAIL_PLUGINS."
            if status.asked
            else f"Or leave it out with DOVETAIL_DISABLE_PLUGINS={status.name}."
        )
        return msgspec.structs.replace(
            status,
            state="failed" if status.asked else "quarantined",
            error=remedy.one_line(error),
            remedy=f"{cure} {way_out}",
            traceback="".join(traceback.format_exception(error)),
            provides=_provides(self._staged),
            seconds=seconds,
        )

    def succeeded(self, seconds: float) -> PluginStatus:
        """Say what it provides, and what is not right nevertheless."""
        warnings = [slowness(seconds), *map(_old_version, self._staged), *map(_lacking, self._staged)]
        warnings += [deprecations.notice(deprecations.hook(name)) for name in self._hooks]
        return msgspec.structs.replace(
            self._status,
            provides=_provides(self._staged),
            warnings=tuple(dict.fromkeys(warning for warning in warnings if warning)),
            seconds=seconds,
        )

    def _register_for(self, hook: Hook) -> Callable[[Manifest, str], None]:
        def register(manifest: Manifest, target: str) -> None:
            status = self._status
            entry: Entry[Any] = Entry(
                manifest=read_manifest(hook, manifest),
                target=target,
                plugin=status.name,
                distribution=status.distribution,
                version=status.version,
            )
            check_registration(hook, entry)
            self._registries.by_kind()[hook.kind].add(entry)
            self._staged.append((hook, entry))
            if self._trace:
                _say(f"{status.name}: + {hook.kind} {entry.name} -> {target}")

        return register


def _old_version(staged: tuple[Hook, Entry[Any]]) -> str:
    """A warning, if it is registered for the contract's previous version; else nothing."""
    hook, entry = staged
    if entry.manifest.api == API_VERSIONS[hook.contract]:
        return ""
    what = deprecations.contract(hook.contract, entry.manifest.api)
    return f"{entry.name!r} is made for an old contract: {deprecations.notice(what)}"


def _lacking(staged: tuple[Hook, Entry[Any]]) -> str:
    """A warning, if something that it requires is not installed, unless that is an extra; else nothing."""
    _, entry = staged
    gap = "" if entry.manifest.extra else explain_unmet(entry.manifest.requires)
    return f"{entry.name!r} cannot be used: it {gap}." if gap else ""


def _origin(point: EntryPoint) -> tuple[str, str]:
    if point.dist is None:
        return "(unknown distribution)", "?"
    return point.dist.name or "(nameless distribution)", point.dist.version or "?"


def _provides(staged: Iterable[tuple[Hook, Entry[Any]]]) -> dict[str, tuple[str, ...]]:
    provides: dict[str, tuple[str, ...]] = {}
    for hook, entry in staged:
        provides[hook.kind] = (*provides.get(hook.kind, ()), entry.name)
    return provides


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
        if status.state == "quarantined" and key not in _warned:
            _warned.add(key)
            _logger.warning(
                "The %s failed to load and is left out: %s `dovetail plugins` shows the details.",
                status.owner,
                status.failure,
            )
