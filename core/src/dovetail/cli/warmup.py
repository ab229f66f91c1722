"""``dovetail warmup``."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import click

from dovetail import sizes
from dovetail.cli import log
from dovetail.cli.options import as_arguments, engine_command
from dovetail.cli.section_options import EngineCommand
from dovetail.errors import ConfigError
from dovetail.options import EngineOptions


@click.command(cls=EngineCommand)
@engine_command
@click.option(
    "--export-cache",
    metavar="DIR",
    help="Keep what is compiled in this folder, to be the --compile-cache of other starts.",
)
def warmup(engine: EngineOptions, log_level: str, export_cache: str | None) -> None:
    """Load a model, compile what its steps need, and exit.

    Later starts find it compiled, if they have the same options, versions and chip. An image can bring the folder.
    """
    log.set_up(log_level)
    if export_cache is not None:
        if engine.compile_cache not in (None, export_cache):
            raise ConfigError(
                f"--export-cache is {export_cache}, and --compile-cache {engine.compile_cache}: both name the folder "
                "that keeps what is compiled. Leave out one of them."
            )
        engine = replace(engine, compile_cache=export_cache)
    from dovetail import LLM

    start = time.perf_counter()
    with LLM(**as_arguments(engine)) as llm:
        config = llm.config
    seconds = time.perf_counter() - start
    click.echo(f"{config.model_name} is warmed up on {config.platform.name} after {seconds:.1f} s.")
    click.echo(_kept(config.compile_cache))


def _kept(folder: str | None) -> str:
    if folder is None:
        return "Nothing is kept."
    kept = [path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()]
    if not kept:
        return f"There was nothing to keep in {folder}."
    return f"{folder} holds {len(kept)} files, {sizes.size(sum(kept))}."
