"""The suite of commands passes sound ones and catches broken ones, each by the scenario that it breaks."""

from __future__ import annotations

import click
import pytest

from dovetail.plugins.host import PluginHost
from dovetail.plugins.manifest import CommandManifest
from dovetail.testing.conformance import CommandSuite, unregistered
from dovetail.testing.conformance.plugin import check_plugin

MANIFEST = CommandManifest(name="measure", summary="For a test.")


@click.command()
@click.option("--rods", default=7, help="How many there are.")
def sound(rods):
    """Measure something."""
    raise AssertionError("help runs nothing")


@click.group()
def group():
    """Measure things."""


group.add_command(sound, "length")


@click.command()
def silent():
    pass


@click.command()
@click.option("--rods")
def option_without_help(rods):
    """Measure something."""


@click.group()
def group_of_silent():
    """Measure things."""


group_of_silent.add_command(silent, "length")


class Loud(click.Command):
    def get_help(self, ctx):
        raise RuntimeError("no beads")


class Shy(click.Command):
    def get_help(self, ctx):
        return ""


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("rest", nargs=-1, type=click.UNPROCESSED)
def takes_anything(rest):
    """Measure something."""


@click.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def fails_without_a_word():
    """Measure something."""
    raise SystemExit(2)


@click.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def goes_on():
    """Measure something."""
    raise OSError("no rods")


BROKEN = {
    "a string": ("measure", "command.1"),
    "no help": (silent, "command.2"),
    "option without help": (option_without_help, "command.2"),
    "no help below": (group_of_silent, "command.2"),
    "help fails": (Loud("measure", help="Measure something."), "command.3"),
    "help is empty": (Shy("measure", help="Measure something."), "command.3"),
    "takes anything": (takes_anything, "command.4"),
    "goes on": (goes_on, "command.4"),
    "refuses without a word": (fails_without_a_word, "command.4"),
}


@pytest.mark.parametrize("command", [sound, group], ids=["command", "group"])
def test_a_sound_command_passes(failing, command):
    assert failing(CommandSuite, unregistered(command, MANIFEST)) == {}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_command_is_caught(failing, name):
    command, scenario = BROKEN[name]
    assert scenario in failing(CommandSuite, unregistered(command, MANIFEST), scenario)


@pytest.mark.parametrize("scenario", ["command.1", "command.2", "command.3", "command.4"])
def test_what_is_no_command_is_said_by_every_scenario(failing, scenario):
    (reason,) = failing(CommandSuite, unregistered(5, MANIFEST), scenario).values()
    assert f"{scenario}: 5 is a int, not a click.Command." in reason


def test_what_it_raises_is_said(failing):
    (reason,) = failing(CommandSuite, unregistered(goes_on, MANIFEST), "command.4").values()
    assert "exit code of `measure --no-such-option-anywhere`: expected 2, got OSError('no rods')." in reason


def test_commands_of_the_core_conform():
    report = check_plugin(PluginHost().discover(warn=False), "builtin", kinds=["command"])
    assert {part.name: part.problem for part in report.parts if not part.conforms} == {}
    assert "serve" in {part.name for part in report.parts}
