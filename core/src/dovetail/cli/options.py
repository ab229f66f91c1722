"""Options generated from the option dataclasses, so that flags, YAML keys and ``LLM`` arguments agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from functools import update_wrapper
from pathlib import Path
from typing import Any, cast

import click

from dovetail import env
from dovetail.cli import config_file, section_options
from dovetail.options import EngineOptions, ServerOptions, flag, kinds, parse

Command = Callable[..., Any]


def json_object(value: str) -> dict[str, Any]:
    """A JSON object on the command line.

    Raises:
        click.BadParameter: it is not JSON, or not an object.
    """
    try:
        parsed = json.loads(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not JSON: {error}.") from None
    if not isinstance(parsed, dict):
        raise click.BadParameter(f"{value!r} is JSON, but not an object in braces.")
    return parsed


def with_options(*classes: type) -> Callable[[Command], click.Command | Command]:
    """Add every field of the dataclasses as an option, ``[MODEL]`` as an argument, and ``--config``.

    The command then receives one instance per class, in order, before its own keyword arguments. Values come
    from the command line, else from the file, else from the environment, else from the defaults. The file may hold
    options of the engine and the server alike, so that one file does for every command; those that the command does
    not take are checked and left aside.
    """

    def decorate(command: Command) -> Command:
        def collect(*, config: Path | None, **given: Any) -> Any:
            table = {name: kind for cls in classes for name, kind in kinds(cls).items()}
            values = {} if config is None else config_file.read(config, kinds(ServerOptions) | kinds(EngineOptions))
            values |= {name: given[name] for name in table if given[name] is not None}
            if "platform" in table:
                section_options.overlay(values)
            rest = {name: value for name, value in given.items() if name not in table}
            if "api_key" in table and values.get("api_key") is None:
                values["api_key"] = env.text("DOVETAIL_API_KEY")
            instances: list[Any] = [
                parse(cls, {f.name: values[f.name] for f in fields(cls) if f.name in values})
                for cls in classes
            ]
            return command(*instances, **rest)

        decorated: Any = update_wrapper(collect, command)
        for cls in reversed(classes):
            for field in reversed(fields(cls)):
                decorated = _decorator(field, kinds(cls)[field.name])(decorated)
        add = click.option(
            "--config",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            metavar="FILE.yaml",
            help="YAML file with the same options as keys.",
        )
        return cast("Command", add(decorated))

    return decorate


def _decorator(field: Field[Any], kind: type) -> Callable[[Any], Any]:
    """The click decorator of one field. Defaults stay None here: a file's values come before them."""
    if field.name == "model":
        return click.argument("model", required=False, metavar="[MODEL]")
    help = field.metadata["help"]
    if field.default is not None and field.default is not MISSING:
        shown = str(field.default).lower() if kind is bool else field.default
        help = f"{help}  [default: {shown}]"
    spelling = flag(field.name)
    if kind is bool:
        return click.option(f"{spelling}/--no-{spelling[2:]}", default=None, help=help)
    choices = field.metadata["choices"]
    kind_of: Any = click.Choice(choices) if choices else json_object if kind is dict else kind
    return click.option(spelling, type=kind_of, metavar=field.metadata["metavar"] or None, help=help)


def engine_command(command: Command) -> Command:
    """A command that runs an engine: its options, and ``--log-level``."""
    log_level = click.option(
        "--log-level",
        type=click.Choice(("debug", "info", "warning", "error")),
        default="warning",
        show_default=True,
        help="Log level; debug also shows tracebacks of errors.",
    )
    return with_options(EngineOptions)(log_level(command))


def server_command(command: Command) -> Command:
    """A command that runs a server: the engine's options and the server's."""
    return with_options(EngineOptions, ServerOptions)(command)


def json_option(command: Command) -> Command:
    """``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(command)


def as_arguments(options: EngineOptions) -> dict[str, Any]:
    """The keyword arguments of ``LLM`` that give these options."""
    return {field.name: getattr(options, field.name) for field in fields(options)}
