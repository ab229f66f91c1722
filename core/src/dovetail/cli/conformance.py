"""``dovetail conformance``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dovetail.errors import ConfigError
from dovetail.plugins.host import PluginHost

if TYPE_CHECKING:
    from dovetail.testing.conformance.report import Report

KINDS = ("platform", "attention", "model", "quant", "specdec", "command")


@click.command()
@click.argument("plugin")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(KINDS), help="Test only this kind; repeatable.")
@click.option("--name", "names", multiple=True, metavar="NAME", help="Test only what has this name; repeatable.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json", "html"]),
    default="text",
    show_default=True,
    help="Form of the report.",
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the report to this file.")
def conformance(plugin: str, kinds: tuple[str, ...], names: tuple[str, ...], form: str, output: Path | None) -> int:
    """Run the conformance suites of everything that an installed plugin registers.

    PLUGIN is the plugin's name in `dovetail plugins`. Exit code 1 if a scenario fails, or if something could not be
    tested, because its device is not here, say.
    """
    if find_spec("pytest") is None:
        raise ConfigError("The conformance suites need pytest; pip install 'dovetail-core[testing]'.")
    if output is not None:
        _check_writable(output)
    with redirect_stdout(sys.stderr), _progress() as on_result:  # what plugins print is no part of the report
        discovery = PluginHost().discover(warn=False)  # as in every command: before the suites bring torch
        from dovetail.testing.conformance.plugin import check_plugin

        report = check_plugin(discovery, plugin, kinds=kinds, names=names, on_result=on_result)
    text = _rendered(report, form, width=None if output is None else 120)
    if output is None:
        click.echo(text)
    else:
        output.write_text(text + "\n", encoding="utf-8")
        click.echo(f"{report.verdict} Report: {output}", err=True)
    return 0 if report.conforms else 1


def _check_writable(output: Path) -> None:
    """Before the suites run, so that no report is lost.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        output.open("a", encoding="utf-8").close()
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written ({error.strerror}); name another file.") from error


@contextmanager
def _progress() -> Iterator[Any]:
    """The test that ran last, on a terminal."""
    from rich.console import Console

    with Console(stderr=True).status("Starting …") as status:
        yield lambda result: status.update(f"{result.scenario} {result.test}")


def _rendered(report: Report, form: str, width: int | None) -> str:
    if form == "json":
        import msgspec

        return json.dumps(msgspec.to_builtins(report), indent=2)
    if form == "html":
        from dovetail.cli.conformance_html import page

        return page(report)
    return _text(report, width)


def _text(report: Report, width: int | None) -> str:
    """A table per registered thing, failures below it, and the verdict at the end."""
    from rich.console import Console
    from rich.text import Text

    console = Console(width=width, force_terminal=False if width else None)
    with console.capture() as captured:
        title = f"{report.plugin}  ({report.distribution} {report.version}, suites of dovetail-core {report.core})"
        console.print(Text(title, style="bold"))
        for part in report.parts:
            _print_part(console, part)
        style = "bold green" if report.conforms else "bold red"
        console.print(Text(f"\n{report.verdict} {report.seconds:.1f} s", style=style))
    return captured.get().rstrip()


def _print_part(console: Any, part: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    styles = {"passed": "green", "failed": "red", "skipped": "yellow"}
    counts = ", ".join(f"{part.count(outcome)} {outcome}" for outcome in styles)
    console.print(Text(f"\n{part.kind} {part.name!r}: {counts}", style="bold"))
    if part.problem:
        console.print(Text(part.problem, style="red"))
    if part.scenarios:
        table = Table("scenario", "behaviour", "outcome", "s")
        table.columns[0].no_wrap = True
        for found in part.scenarios:
            reason = f" ({', '.join(found.reasons)})" if found.outcome == "skipped" else ""
            outcome = Text(found.outcome + reason, style=styles[found.outcome])
            table.add_row(found.scenario, Text(found.behaviour), outcome, f"{found.seconds:.2f}")
        console.print(table)
    for test in (test for found in part.scenarios for test in found.tests if test.outcome == "failed"):
        console.print(Text(f"{test.suite}.{test.test}", style="red"))
        console.print(Text(f"  {test.reason}"))
