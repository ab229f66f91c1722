"""The ``bench`` group."""

from __future__ import annotations

import click

from dovetail.cli.main import LazyGroup

COMMANDS = {
    "throughput": ("dovetail.cli.bench.throughput:throughput", "Many requests at once, without a server."),
    "latency": ("dovetail.cli.bench.latency:latency", "One request at a time, without a server."),
    "serve": ("dovetail.cli.bench.serve:serve", "Load on a running server."),
    "startup": ("dovetail.cli.bench.startup:startup", "From the command to the first token."),
}


@click.group(cls=LazyGroup, lazy=COMMANDS)
def bench() -> None:
    """Measure throughput, latency, a running server, or start-up."""
