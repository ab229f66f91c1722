"""The suites of everything that an installed plugin registers."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

from dovetail import __version__
from dovetail.errors import ConfigError, PluginLoadError
from dovetail.plugins.host import Discovery
from dovetail.plugins.registration import HOOKS, Hook
from dovetail.plugins.registry import Entry, PluginStatus, nearest
from dovetail.resolution.decision import Decision, load
from dovetail.testing.conformance.catalogue import SUITES
from dovetail.testing.conformance.report import Part, Report, Result, by_scenario, unavailable
from dovetail.testing.conformance.run import run
from dovetail.testing.conformance.subject import registered
from dovetail.testing.conformance.suite import Suite

_CONTRACTS = {
    "platform": "Platform",
    "attention": "AttentionBackend",
    "model": "Model",
    "quant": "QuantMethod",
    "specdec": "SpecDecoder",
}


def check_plugin(
    discovery: Discovery,
    plugin: str,
    *,
    kinds: Collection[str] = (),
    names: Collection[str] = (),
    on_result: Callable[[Result], None] = lambda _: None,
) -> Report:
    """Run the suites of what the plugin registers.

    Args:
        plugin: its entry-point name.
        kinds: contracts to test, e.g. ``"attention"``; empty means all.
        names: registered names to test; empty means all.
        on_result: called after each test.

    Raises:
        ConfigError: no such plugin is installed, or it registers nothing that was asked for.
        PluginLoadError: it is broken or switched off.
    """
    status = _status(discovery, plugin)
    started = time.perf_counter()
    chosen = [
        (hook, entry)
        for hook, entry in _entries(discovery, plugin)
        if (not kinds or hook.contract in kinds) and (not names or entry.name in names)
    ]
    if not chosen:
        raise ConfigError(_nothing(discovery, status, kinds, names))
    parts = tuple(_part(discovery, hook, entry, on_result) for hook, entry in chosen)
    return Report(
        plugin=plugin,
        distribution=status.distribution,
        version=status.version,
        core=__version__,
        conforms=all(part.conforms for part in parts),
        seconds=time.perf_counter() - started,
        parts=parts,
    )


def _status(discovery: Discovery, plugin: str) -> PluginStatus:
    found = next((status for status in discovery.plugins if status.name == plugin), None)
    installed = sorted(status.name for status in discovery.plugins)
    if found is None:
        near = nearest(plugin, installed)
        raise ConfigError(f"No plugin {plugin!r} is installed.{near} Installed: {', '.join(installed)}.")
    if found.broken:
        raise PluginLoadError(f"The {found.owner} cannot be tested: it is {found.state}. {found.failure}")
    if found.state == "disabled":
        raise PluginLoadError(f"The {found.owner} is switched off, so it cannot be tested; take it off the list.")
    return found


def _entries(discovery: Discovery, plugin: str) -> Iterator[tuple[Hook, Entry[Any]]]:
    for hook in HOOKS:
        for entry in discovery.registries.by_kind()[hook.kind]:
            if entry.plugin == plugin:
                yield hook, entry


def _nothing(
    discovery: Discovery, status: PluginStatus, kinds: Collection[str], names: Collection[str]
) -> str:
    everything = [f"{hook.contract} {entry.name!r}" for hook, entry in _entries(discovery, status.name)]
    if not everything:
        return f"The {status.owner} registers nothing, so there is nothing to test."
    asked = " and ".join(f"{what} {', '.join(given)}" for what, given in (("kind", kinds), ("name", names)) if given)
    return f"The {status.owner} registers nothing of {asked}. It registers {', '.join(everything)}."


def _part(discovery: Discovery, hook: Hook, entry: Entry[Any], on_result: Callable[[Result], None]) -> Part:
    problem, results = _broken(hook, entry), list[Result]()
    if not problem:
        results = run(_classes(discovery, hook, entry.name), on_result=on_result)
        problem = unavailable(results)
    return Part(kind=hook.contract, name=entry.name, problem=problem, scenarios=by_scenario(results))


def _broken(hook: Hook, entry: Entry[Any]) -> str:
    """Why the registered target is no implementation of its contract; empty if it is one."""
    if hook.contract not in _CONTRACTS:  # no class of ours
        return _unimportable(entry)
    decision: Decision[Any] = Decision(part=hook.contract)
    load(entry, f"dovetail.contracts.{hook.contract}:{_CONTRACTS[hook.contract]}", decision)
    return " ".join(decision.broken)


def _unimportable(entry: Entry[Any]) -> str:
    try:
        entry.load()
    except PluginLoadError as error:
        return str(error)
    return ""


def _classes(discovery: Discovery, hook: Hook, name: str) -> dict[str, type[Suite]]:
    """What an implementer would write: one subclass per suite, with the subject."""
    subject = registered(name, discovery.registries)
    label = "".join(word.capitalize() for word in re.split(r"\W+", name))
    return {
        f"Test{label}{suite.__name__}": type(f"Test{label}{suite.__name__}", (suite,), {"subject": subject})
        for suite in SUITES[hook.kind]
    }
