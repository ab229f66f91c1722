"""``dovetail plugins``."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout

import click
import msgspec

from dovetail.cli.options import json_option
from dovetail.plugins.host import PluginHost
from dovetail.plugins.registry import PluginStatus

_STYLES = {"loaded": "green", "quarantined": "red", "failed": "red", "disabled": "yellow"}
_NOUNS = {
    "platforms": "platform",
    "attention": "attention",
    "models": "models",
    "quant": "quantization",
    "spec_decoders": "speculation",
    "commands": "commands",
}


@click.command()
@json_option
def plugins(as_json: bool) -> None:
    """List installed plugins: what each provides, why it failed if it did, and what to do about it."""
    with redirect_stdout(sys.stderr):  # what plugins print is no part of the answer
        found = PluginHost().discover(warn=False).plugins
    if as_json:
        click.echo(json.dumps({"plugins": [msgspec.to_builtins(plugin) for plugin in found]}, indent=2))
        return
    _print_table(found)


def _print_table(found: tuple[PluginStatus, ...]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table("plugin", "distribution", "version", "state", "provides")
    for plugin in found:
        state = Text(plugin.state, style=_STYLES[plugin.state])
        provides = "" if plugin.broken else "\n".join(_provided(plugin))
        source = (Text(plugin.name), Text(plugin.distribution), Text(plugin.version))
        table.add_row(*source, state, Text(provides or "–"))
    console.print(table)
    for plugin in found:
        for warning in plugin.warnings:
            console.print(Text(f"\n{plugin.owner}: {warning}", style="yellow"), soft_wrap=True)
        if plugin.broken:
            console.print(Text(f"\n{plugin.owner} is {plugin.state}: {plugin.failure}", style="red"), soft_wrap=True)
            console.print(Text(plugin.traceback or ""), soft_wrap=True)


def _provided(plugin: PluginStatus) -> list[str]:
    return [f"{_NOUNS[kind]}: {', '.join(names)}" for kind, names in plugin.provides.items()]
