"""Commands that plugins add to the program: listed with their plugin, imported when called, and clear when broken."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dovetail.cli import main as cli_main
from dovetail.testing.fake_plugins import install

REGISTER = """
from dovetail import hookimpl
from dovetail.plugins.manifest import CommandManifest

@hookimpl
def dovetail_register_commands(register):
    register(CommandManifest(name={name!r}, summary="Count beads.", requires={requires!r}), {target!r})
"""
COUNT = """
import click

@click.command()
@click.option("--rods", default=7, help="How many.")
def count(rods):
    "Count beads."
    click.echo(f"{rods} rods")
    return 3 if rods == 13 else None

word = "count"
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Install a plugin with a command."""
    for variable in ("DOVETAIL_PLUGINS", "DOVETAIL_DISABLE_PLUGINS", "DOVETAIL_TRACE_HOOKS"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fake_beads.py").write_text(COUNT)
    (tmp_path / "fake_rusty.py").write_text("import no_such_module_of_beads\n")

    def add(plugin="abacus", name="count", target="fake_beads:count", requires=()):
        return install(tmp_path, plugin, REGISTER.format(name=name, target=target, requires=requires), version="1.2")

    yield add
    for name in [name for name in sys.modules if name.startswith("fake_")]:
        del sys.modules[name]


def test_a_command_of_a_plugin_runs(plugin, capsys):
    plugin()
    assert cli_main.run(["count"]) == 0
    assert capsys.readouterr().out == "7 rods\n"
    assert cli_main.run(["count", "--rods", "13"]) == 3
    assert cli_main.run(["count", "--rod", "many"]) == 2


def test_help_lists_it_with_its_plugin_and_imports_nothing(plugin, capsys):
    plugin()
    assert cli_main.run(["--help"]) == 0
    section = capsys.readouterr().out.partition("Commands of plugins:\n")[2]
    assert "  count  Count beads. (plugin 'abacus')\n" in section
    assert "fake_beads" not in sys.modules


def test_help_without_such_commands_has_no_such_section(capsys, monkeypatch):
    monkeypatch.setenv("DOVETAIL_PLUGINS", "builtin")
    assert cli_main.run(["--help"]) == 0
    assert "Commands of plugins" not in capsys.readouterr().out


def test_commands_of_the_core_discover_nothing(plugin):
    plugin()
    code = "import sys, dovetail.cli.main as m; m.run(['new', '--help']); print('dovetail.plugins' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("options", [["--disable-plugins", "abacus"], ["--plugins", "builtin"]])
def test_lists_of_plugins_count_for_commands(plugin, capsys, options):
    plugin()
    assert cli_main.run([*options, "--help"]) == 0
    assert "Count beads" not in capsys.readouterr().out
    assert cli_main.run([*options, "count"]) == 2
    assert "plugin 'abacus' (dist-abacus 1.2)" in capsys.readouterr().err


def test_a_name_of_the_core_is_taken(plugin, capsys):
    plugin(name="serve")
    plugin(plugin="other", name="count")
    assert cli_main.run(["plugins"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "command 'serve' of plugin 'abacus' (dist-abacus 1.2) is already registered by plugin 'builtin' (dovetail-core"
        in shown
    )
    assert cli_main.run(["count"]) == 0


def test_a_name_of_another_plugin_is_taken(plugin, capsys):
    plugin()
    plugin(plugin="soroban", target="fake_beads:word")
    assert cli_main.run(["count"]) == 0, "whoever came first keeps it"
    assert cli_main.run(["cuont"]) == 2
    complaint = capsys.readouterr().err
    assert "No such command 'cuont'. Did you mean 'count'?" in complaint
    assert (
        "command 'count' of plugin 'soroban' (dist-soroban 1.2) is already registered by plugin 'abacus' "
        "(dist-abacus 1.2). Rename one" in complaint
    )
    assert cli_main.run(["--help"]) == 0
    assert "Failed to load, and may bring more: 'soroban'." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"target": "fake_rusty:count"}, "cannot be imported from fake_rusty:count: ModuleNotFoundError"),
        ({"target": "fake_beads:word"}, "names fake_beads:word, a str and no click.Command."),
        ({"requires": ("wax>=2",)}, "requires wax>=2, which is not installed; run: pip install 'wax>=2'."),
    ],
)
def test_a_broken_command_names_its_plugin_and_breaks_no_other(plugin, capsys, broken, says):
    plugin(**broken)
    plugin(plugin="other", name="tally")
    assert cli_main.run(["count"]) == 2
    complaint = capsys.readouterr().err
    assert f"error: 'count' of plugin 'abacus' (dist-abacus 1.2) {says}" in complaint
    assert "Traceback" not in complaint
    for arguments in (["tally"], ["--help"], ["plugins"]):
        assert cli_main.run(arguments) == 0


def test_a_missing_command_of_a_plugin_that_failed(plugin, tmp_path, capsys):
    install(tmp_path, "lost", "import no_such_module_of_beads")
    assert cli_main.run(["count"]) == 2
    complaint = capsys.readouterr().err
    assert "plugin 'lost' (dist-lost 1.0) might provide it but failed to load: ModuleNotFoundError" in complaint


def test_a_wrong_list_of_plugins_does_not_hide_help(plugin, capsys, monkeypatch):
    plugin()
    monkeypatch.setenv("DOVETAIL_PLUGINS", "abucas")
    assert cli_main.run(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "DOVETAIL_PLUGINS names 'abucas', but no such plugin is installed. Did you mean 'abacus'?" in shown
    assert cli_main.run(["count"]) == 2
    assert "error: DOVETAIL_PLUGINS names 'abucas'" in capsys.readouterr().err
