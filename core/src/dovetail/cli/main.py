"""The entry point: finds the command, imports it, and turns errors into one message and an exit code."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

import click

from dovetail import __version__
from dovetail.cli.commands import COMMANDS
from dovetail.errors import ConfigError, DovetailError, PluginError


class LazyGroup(click.Group):
    """A group whose commands are imported only when they are called, not for ``--help``.

    Args:
        lazy: per command, its ``"module:attribute"`` and one line of help.
    """

    def __init__(self, *args: Any, lazy: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every name, in the table's order."""
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        """Import one command; an unknown name is a usage error with the nearest one."""
        if cmd_name not in self.lazy:
            _unknown(ctx, cmd_name, self.lazy)
        module, _, attribute = self.lazy[cmd_name][0].partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self.lazy.items()])


def _unknown(ctx: click.Context, name: str, known: Iterable[str], hints: Iterable[str] = ()) -> NoReturn:
    near = get_close_matches(name, list(known), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    ctx.fail(" ".join([f"No such command {name!r}.{hint}", *hints]))


class Commands(LazyGroup):
    """The core's commands, and those of plugins, which are discovered only for a name that the core does not have."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The core's names, then those of plugins."""
        from dovetail.cli import plugin_commands

        return [entry.name for entry in plugin_commands.discover().commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        """Import one command; an unknown name is a usage error with the nearest one, and with plugins that failed."""
        if cmd_name in self.lazy:
            return super().get_command(ctx, cmd_name)
        from dovetail.cli import plugin_commands

        registry = plugin_commands.discover().commands
        if cmd_name not in registry:
            _unknown(ctx, cmd_name, registry.names(), registry.hints)
        return plugin_commands.load(registry.get(cmd_name))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the core's commands, and those of plugins with their plugin, without importing any."""
        from dovetail.cli import plugin_commands

        super().format_commands(ctx, formatter)
        added, note = plugin_commands.listing()
        if added or note:
            with formatter.section("Commands of plugins"):
                formatter.write_dl([*added, ("", note)] if note else added)


def _export(variable: str) -> Any:
    """Sets an environment variable as soon as the option is read: which commands there are depends on it."""

    def callback(ctx: click.Context, parameter: click.Parameter, value: str | bool | None) -> None:
        if value is not None and value is not False:
            os.environ[variable] = "1" if value is True else str(value)

    return {"callback": callback, "is_eager": True, "expose_value": False}


@click.group(cls=Commands, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dovetail", help="Show the version and exit.")
@click.option(
    "--plugins", metavar="NAMES", help="Load these plugins only; sets DOVETAIL_PLUGINS.", **_export("DOVETAIL_PLUGINS")
)
@click.option(
    "--disable-plugins",
    metavar="NAMES",
    help="Leave these out; sets DOVETAIL_DISABLE_PLUGINS.",
    **_export("DOVETAIL_DISABLE_PLUGINS"),
)
@click.option(
    "--trace-hooks",
    is_flag=True,
    help="Print every hook call; sets DOVETAIL_TRACE_HOOKS.",
    **_export("DOVETAIL_TRACE_HOOKS"),
)
def cli() -> None:
    """Serve large language models on any accelerator."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0, 1 (failed), 2 (asked wrongly) or 130 (interrupted).

    A deliberate error is one message on stderr; its traceback shows only at log level debug.
    """
    try:
        result = cli.main(args=list(arguments), prog_name="dovetail", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        return 130
    except BrokenPipeError:
        # the reader of our output left; a second error at interpreter exit would only confuse
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except DovetailError as error:
        if logging.getLogger("dovetail").isEnabledFor(logging.DEBUG):
            logging.getLogger("dovetail").debug("Traceback of the error below:", exc_info=True)
        click.echo(f"{click.style('error:', fg='red', bold=True)} {error}", err=True)
        return 2 if isinstance(error, (ConfigError, PluginError)) else 1
    return result if isinstance(result, int) else 0


def main() -> NoReturn:
    """The console script."""
    sys.exit(run(sys.argv[1:]))
