"""The entry point: finds the command, imports it, and turns errors into one message and an exit code."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

import click

from dovetail import __version__
from dovetail.errors import ConfigError, DovetailError, PluginError

COMMANDS = {
    "serve": ("dovetail.cli.serve:serve", "Serve a model over the OpenAI-compatible HTTP API."),
    "chat": ("dovetail.cli.chat:chat", "Talk to a running server."),
    "generate": ("dovetail.cli.generate:generate", "Complete prompts without a server."),
    "bench": (
        "dovetail.cli.bench.group:bench",
        "Measure throughput, latency, a running server, or start-up.",
    ),
    "warmup": ("dovetail.cli.warmup:warmup", "Compile what a model needs, for later starts, and exit."),
    "plugins": ("dovetail.cli.plugins:plugins", "List installed plugins and what they provide."),
    "explain": ("dovetail.cli.explain:explain", "Show what would run a model, and why."),
    "doctor": ("dovetail.cli.doctor.command:doctor", "Check whether this machine can serve, and say what to do."),
    "conformance": (
        "dovetail.cli.conformance:conformance",
        "Run the conformance suites of everything that an installed plugin registers.",
    ),
    "new": ("dovetail.cli.new:new", "Write a plugin package that runs, to start from."),
}


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
            near = get_close_matches(cmd_name, self.lazy, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            ctx.fail(f"No such command {cmd_name!r}.{hint}")
        module, _, attribute = self.lazy[cmd_name][0].partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self.lazy.items()])


@click.group(cls=LazyGroup, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dovetail", help="Show the version and exit.")
@click.option("--plugins", metavar="NAMES", help="Load these plugins only; sets DOVETAIL_PLUGINS.")
@click.option("--disable-plugins", metavar="NAMES", help="Leave these out; sets DOVETAIL_DISABLE_PLUGINS.")
@click.option("--trace-hooks", is_flag=True, help="Print every hook call; sets DOVETAIL_TRACE_HOOKS.")
def cli(plugins: str | None, disable_plugins: str | None, trace_hooks: bool) -> None:
    """Serve large language models on any accelerator."""
    for variable, value in (
        ("DOVETAIL_PLUGINS", plugins),
        ("DOVETAIL_DISABLE_PLUGINS", disable_plugins),
        ("DOVETAIL_TRACE_HOOKS", "1" if trace_hooks else None),
    ):
        if value is not None:
            os.environ[variable] = value


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
