"""``dovetail explain``."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

import click
import msgspec

from dovetail.cli import log
from dovetail.cli.options import engine_command, json_option
from dovetail.cli.section_options import EngineCommand
from dovetail.options import EngineOptions
from dovetail.plugins.host import PluginHost

if TYPE_CHECKING:
    from rich.console import Console

    from dovetail.config import Rejected
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
    "async_scheduling",
    "scheduling_policy",
    "num_speculative_tokens",
)


@click.command(cls=EngineCommand)
@engine_command
@json_option
def explain(engine: EngineOptions, log_level: str, as_json: bool) -> int:
    """Show what would run a model: which plugin gives each part, what was rejected, and why.

    If the model cannot run as asked, every reason is listed with the nearest configuration that works, and the exit
    code is 1; with --allow-fallback that configuration is explained instead.
    """
    log.set_up(log_level)
    from dovetail import resolver

    with redirect_stdout(sys.stderr):  # what plugins print is no part of the answer
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
    _print_rejected(console, explanation)
    _print_refusal(console, explanation)
    if explanation.config is None:
        return
    settings = Table("setting", "value")
    for name in _SHOWN:
        settings.add_row(name, Text(str(getattr(explanation.config, name))))
    console.print(settings)


def _print_rejected(console: Console, explanation: Explanation) -> None:
    """Who was not taken and why, less what the refusal says anyway."""
    from rich.text import Text

    for part in explanation.parts:
        for candidate in part.rejected:
            reasons = [reason for reason in candidate.reasons if not _refuses(explanation, candidate, reason)]
            if reasons:
                console.print(Text(f"{part.part} {candidate.name} was not taken:", style="dim"))
            for reason in reasons:
                console.print(Text(f"  - {reason}", style="dim"), soft_wrap=True)


def _refuses(explanation: Explanation, candidate: Rejected, reason: str) -> bool:
    """Whether a candidate's reason is one of those for which the request is refused."""
    who = f"{candidate.name!r} of plugin {candidate.plugin!r} "
    return any(who in obstacle and reason.rstrip(".") in obstacle for obstacle in explanation.reasons)


def _print_refusal(console: Console, explanation: Explanation) -> None:
    """Why it does not run as asked, and what does instead."""
    from rich.text import Text

    from dovetail import resolver

    if not explanation.reasons:
        return
    style = "red" if explanation.config is None else "yellow"
    console.print(Text(f"Cannot run {explanation.model_name} as asked:", style=f"bold {style}"))
    for reason in explanation.reasons:
        console.print(Text(f"  - {reason}", style=style), soft_wrap=True)
    if explanation.config is None:
        console.print(Text(resolver.suggestion(explanation)), soft_wrap=True)
        return
    console.print(Text("With --allow-fallback this runs instead:", style="bold yellow"))
    for change in explanation.config.fallbacks:
        console.print(Text(f"  - {resolver.describe(change)}", style=style), soft_wrap=True)
