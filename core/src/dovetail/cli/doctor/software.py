"""What is installed: distributions that fit each other, torch, plugins, platforms."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import Any

from dovetail.cli.doctor.finding import Finding, ok, problem, warning, with_torch
from dovetail.cli.doctor.subject import Subject
from dovetail.plugins.host import GROUP
from dovetail.plugins.registry import Entry, PluginStatus
from dovetail.plugins.remedy import reinstall
from dovetail.plugins.requirements import pip_install, unmet_by


def distributions(subject: Subject) -> Iterator[Finding]:
    """The core, and whatever brings plugins: each with what it depends on."""
    names = {point.dist.name for point in metadata.entry_points(group=GROUP) if point.dist is not None}
    for name in sorted({"dovetail-core", *names}):
        missing = unmet_by(name)
        version = metadata.version(name)
        if missing:
            yield problem(f"{name} {version} needs {', '.join(missing)}", f"Run: {pip_install(missing)}")
        else:
            yield ok(f"{name} {version}")


def torch(subject: Subject) -> Iterator[Finding]:
    """It can be imported, which a mix of builds often breaks."""
    if subject.torch_error:
        yield problem(f"cannot be imported: {subject.torch_error}", f"Run: {reinstall('torch')}")
    else:
        yield ok(metadata.version("torch"))


def plugins(subject: Subject) -> Iterator[Finding]:
    """Every plugin's state."""
    for plugin in subject.discovery.plugins:
        yield from _plugin(plugin)


def _plugin(plugin: PluginStatus) -> Iterator[Finding]:
    for text in plugin.warnings:
        yield warning(f"{plugin.owner}: {text}", "")
    if plugin.broken:
        found = f"{plugin.owner} is {plugin.state}: {plugin.error}"
        yield (problem if plugin.asked else warning)(found, plugin.remedy or "")
    elif plugin.state == "disabled":
        yield ok(f"{plugin.owner} is switched off")
    else:
        provided = "; ".join(f"{kind} {', '.join(names)}" for kind, names in plugin.provides.items())
        yield ok(f"{plugin.owner}: {provided or 'registers nothing'}")


@with_torch
def platforms(subject: Subject) -> Iterator[Finding]:
    """Every platform's probe."""
    registries = subject.registries
    if registries is None:
        return
    available = False
    for entry in registries.platforms.ranked():
        finding = _platform(entry, asked=entry.name == subject.engine.platform)
        available |= finding.level == "ok"
        yield finding
    if not available:
        yield problem("no platform can be used on this machine", "Repair one of those above.")


def _platform(entry: Entry[Any], *, asked: bool) -> Finding:
    level = problem if asked else warning
    try:
        probe = entry.load().probe()
    except (Exception, SystemExit) as error:  # noqa: BLE001  a plugin's failure is what is looked for
        return level(f"{entry.name} of {entry.owner} cannot be asked: {type(error).__name__}: {error}", "")
    facts = ", ".join(f"{name} {value}" for name, value in probe.facts.items())
    if probe.available:
        return ok(f"{entry.name}: {facts or 'available'}")
    return level(f"{entry.name} is not available here: {probe.reason}", "Use another --platform meanwhile.")
