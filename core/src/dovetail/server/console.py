"""What the operator reads once the server has started."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from dovetail.engine import effective
from dovetail.engine.process import Ready
from dovetail.server.service import ServedModel


def print_configuration(console: Console, model: ServedModel, ready: Ready, url: str) -> None:
    """What runs, why, and where."""
    defaults = ", ".join(f"{name} {value}" for name, value in model.defaults.items())
    rows = [
        *effective.rows(model.config, model.info, model.asked),
        effective.Row("sampling", f"{defaults} (generation_config.json)" if defaults else "temperature 1.0"),
        effective.Row("start-up", ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in ready.seconds.items())),
    ]
    for line in effective.lines(rows):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    serving = f"Serving [bold]{escape(model.name)}[/bold] at [bold]{url}[/bold]"
    console.print(serving, highlight=False, soft_wrap=True)
