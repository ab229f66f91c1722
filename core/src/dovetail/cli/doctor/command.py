"""The command."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout

import click
import msgspec

from dovetail.cli import log
from dovetail.cli.doctor import environment, fit, model_files, software
from dovetail.cli.doctor.finding import OK, PROBLEM, WARNING, Check, Line, examine
from dovetail.cli.doctor.subject import Subject
from dovetail.cli.options import json_option, server_command
from dovetail.cli.section_options import EngineCommand
from dovetail.options import EngineOptions, ServerOptions

CHECKS: dict[str, Check] = {
    "python": environment.python,
    "variables": environment.variables,
    "temporary files": environment.temporary,
    "limits": environment.limits,
    "downloads": environment.downloads,
    "distributions": software.distributions,
    "torch": software.torch,
    "plugins": software.plugins,
    "platforms": software.platforms,
    "model": model_files.config,
    "weights": model_files.weights,
    "tokenizer": model_files.tokenizer,
    "options": fit.options,
    "memory": fit.memory,
    "port": fit.port,
}
"""In the order of the report: what others rest on comes first."""

_COLOURS = {OK: "green", WARNING: "yellow", PROBLEM: "red"}


@click.command(cls=EngineCommand)
@server_command
@json_option
def doctor(engine: EngineOptions, server: ServerOptions, as_json: bool) -> int:
    """Check whether this machine can serve: environment, versions, plugins, devices, model files, memory and port.

    Takes the options of `dovetail serve`, and says of everything that is not in order what to do. Loads no weights and
    downloads nothing. Exit code 1 if there is a problem.
    """
    log.set_up(server.log_level)
    with redirect_stdout(sys.stderr):  # what plugins print is no part of the answer
        lines = examine(CHECKS, Subject(engine, server))
    if as_json:
        click.echo(json.dumps({"checks": msgspec.to_builtins(lines)}, indent=2))
    else:
        _print(lines)
    return 1 if any(line.level == PROBLEM for line in lines) else 0


def _print(lines: list[Line]) -> None:
    width = max(len(line.check) for line in lines)
    for line in lines:
        level = click.style(f"{line.level:7}", fg=_COLOURS[line.level])
        click.echo(f"{level}  {line.check:{width}}  {line.found}")
        if line.remedy:
            click.echo(f"{'':{width + 11}}→ {line.remedy}")
    counts = [(sum(line.level == level for line in lines), level) for level in (PROBLEM, WARNING)]
    found = ", ".join(f"{count} {level}{'s' if count > 1 else ''}" for count, level in counts if count)
    click.echo(f"\n{found or 'All is well'}.")
