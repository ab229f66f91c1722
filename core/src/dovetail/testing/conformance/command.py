"""The conformance suite of commands."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from typing import ClassVar

import click

from dovetail.testing.conformance.suite import Suite

UNKNOWN = "--no-such-option-anywhere"


class CommandSuite(Suite):
    """Holds a command to what users expect of every command: it explains itself, and refuses what it does not know."""

    contract: ClassVar[str] = "command"
    kind: ClassVar[str] = "commands"

    def test_is_a_command(self) -> None:
        """command.1: the target is a command of click, or a group of such."""
        next(self._commands())

    def test_help(self) -> None:
        """command.2: it, every command below it, and each of their options says in a line of help what it does."""
        for name, command in self._commands():
            self.check(bool((command.help or "").strip()), f"`{name}` has no help.")
            for option in (param for param in command.params if isinstance(param, click.Option)):
                self.check(bool((option.help or "").strip()), f"`{name} {option.opts[-1]}` has no help.")

    def test_help_does_nothing_else(self) -> None:
        """command.3: with ``--help`` it prints how it is used, and exits with 0."""
        for name, command in self._commands():
            code, printed, _ = _run(name, command, "--help")
            self.equal(code, 0, f"exit code of `{name} --help`")
            self.check(f"Usage: {name}" in printed, f"`{name} --help` does not say `Usage: {name}`, but {printed!r}.")

    def test_unknown_option(self) -> None:
        """command.4: an option that it does not have is refused by name, with exit code 2."""
        for name, command in self._commands():
            code, _, complaint = _run(name, command, UNKNOWN)
            self.equal(code, 2, f"exit code of `{name} {UNKNOWN}`")
            self.check(UNKNOWN in complaint, f"the message of `{name} {UNKNOWN}` does not name it: {complaint!r}.")

    def _commands(self) -> Iterator[tuple[str, click.Command]]:
        """The command and those below it."""
        found = self.tested.cls
        self.check(isinstance(found, click.Command), f"{found!r} is a {type(found).__name__}, not a click.Command.")
        yield from _below(self.manifest.name, found)


def _below(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    """A command and those below it, each with what is typed."""
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=name)
        for word in command.list_commands(context):
            child = command.get_command(context, word)
            if child is not None:
                yield from _below(f"{name} {word}", child)


def _run(name: str, command: click.Command, word: str) -> tuple[object, str, str]:
    """Exit code, output and complaints of a command with one word behind it; instead of a code, what it raised."""
    printed, complaints = io.StringIO(), io.StringIO()
    with redirect_stdout(printed), redirect_stderr(complaints):
        try:
            command.main([word], prog_name=name)
        except SystemExit as end:
            return end.code, printed.getvalue(), complaints.getvalue()
        except Exception as error:  # noqa: BLE001  whatever a plugin raises is what this looks for
            return error, printed.getvalue(), complaints.getvalue()
    return 0, printed.getvalue(), complaints.getvalue()
