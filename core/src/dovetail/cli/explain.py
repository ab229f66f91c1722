"""``dovetail explain``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click
import msgspec

from dovetail.cli import log
from dovetail.cli.options import engine_command, json_option
from dovetail.options import EngineOptions
from dovetail.plugins.host import PluginHost

if TYPE_CHECKING:
    from dovetail.resolver import Explanation

_SHOWN = (
    "dtype",
    "kv_dtype",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "scheduling_policy",
    "num_speculative_tokens",
)


@click.command()
@engine_command
@json_option
def explain(engine: EngineOptions, log_level: str, as_json: bool) -> int:
    """Show what would run a model: which plugin gives each part, what was rejected, and why.

    Exit code 1 if the model cannot run as asked.
    """
    log.set_up(log_level)
    from dovetail import resolver

    explanation = resolver.explain(engine, PluginHost().discover().registries)
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(explanation), indent=2))
    else:
        _print(explanation)
    return 0 if explanation.config is not None else 1


def _print(explanation: Explanation) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(Text(f"{explanation.model_name}  ({explanation.model_path})", style="bold"), soft_wrap=True)
    table = Table("part", "chosen", "provided by", "why")
    for part in explanation.parts:
        if part.chosen is None:
            table.add_row(part.part, Text("–", style="yellow"), "", "")
        else:
            source = f"{part.plugin} ({part.chosen.distribution} {part.chosen.version})"
            table.add_row(part.part, Text(part.chosen.name, style="green"), source, Text(part.chosen.why))
    console.print(table)
    for part in explanation.parts:
        for candidate in part.rejected:
            console.print(Text(f"{part.part} {candidate.name} was not taken:", style="dim"))
            for reason in candidate.reasons:
                console.print(Text(f"  - {reason}", style="dim"), soft_wrap=True)
    if explanation.config is None:
        console.print(Text(f"Cannot run {explanation.model_name} as asked:", style="bold red"))
        for reason in explanation.reasons:
            console.print(Text(f"  - {reason}", style="red"), soft_wrap=True)
        return
    settings = Table("setting", "value")
    for name in _SHOWN:
        settings.add_row(name, Text(str(getattr(explanation.config, name))))
    console.print(settings)
