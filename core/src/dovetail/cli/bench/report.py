"""Numbers of a measurement, as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import click

PERCENTILES = (50, 90, 99)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which ``percent`` of the values lie, interpolated between neighbours.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("a percentile of no values")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def spread(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles in milliseconds, by name; empty if there are no values."""
    if not seconds:
        return {}
    numbers = {f"{name}_mean_ms": sum(seconds) / len(seconds) * 1e3}
    return numbers | {f"{name}_p{p}_ms": percentile(seconds, p) * 1e3 for p in PERCENTILES}


def show(title: str, numbers: Mapping[str, float | int | str], as_json: bool) -> None:
    """Print the numbers."""
    if as_json:
        click.echo(json.dumps(dict(numbers), indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("measure", "value", title=title)
    table.columns[1].justify = "right"
    for name, value in numbers.items():
        table.add_row(name, f"{value:,.3f}" if isinstance(value, float) else str(value))
    Console().print(table)
