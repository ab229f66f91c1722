"""``dovetail serve``."""

from __future__ import annotations

import click

from dovetail.cli import log
from dovetail.cli.options import server_command
from dovetail.cli.section_options import EngineCommand
from dovetail.options import EngineOptions, ServerOptions


@click.command(cls=EngineCommand)
@server_command
def serve(engine: EngineOptions, server: ServerOptions) -> int:
    """Serve a model over the OpenAI-compatible HTTP API.

    MODEL is a checkpoint folder or a hub id; without one, the embedded demo model is served.
    """
    log.set_up(server.log_level)
    from dovetail.server.main import run

    return run(engine, server)
