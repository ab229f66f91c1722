"""Commands that plugins register: discovered when a name is called that the core does not have, and to list them."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout

import click

from dovetail.errors import ConfigError, PluginLoadError
from dovetail.plugins.host import BUILTIN, PluginHost
from dovetail.plugins.manifest import CommandManifest
from dovetail.plugins.registry import Entry, Registries


def discover() -> Registries:
    """What is registered, without a word about plugins that failed: not every command is affected.

    Raises:
        ConfigError: a list of plugins names one that is not installed.
    """
    with redirect_stdout(sys.stderr):  # what plugins print is no part of a command's output
        return PluginHost().discover(warn=False).registries


def load(entry: Entry[CommandManifest]) -> click.Command:
    """Import a command.

    Raises:
        PluginLoadError: it cannot be imported or is none; names the plugin and says what to do.
    """
    command = entry.load()
    if isinstance(command, click.Command):
        return command
    raise PluginLoadError(
        f"{entry.name!r} of {entry.owner} names {entry.target}, a {type(command).__name__} and no click.Command. "
        f"Install a release of {entry.distribution} that repairs this, or report it to its authors."
    )


def listing() -> tuple[list[tuple[str, str]], str]:
    """For help: each command of a plugin, with what it does and whose it is; and why there may be more, if so.

    Nothing is imported.
    """
    try:
        registries = discover()
    except ConfigError as error:  # help is for those who got something wrong
        return [], str(error)
    found = [entry for entry in registries.commands if entry.plugin != BUILTIN]
    broken = ", ".join(repr(plugin.name) for plugin in registries.plugins if plugin.broken)
    note = f"Failed to load, and may bring more: {broken}. `dovetail plugins` says why." if broken else ""
    return [(entry.name, f"{entry.manifest.summary} (plugin {entry.plugin!r})") for entry in found], note
