"""The command line as a whole: light, documented, and clear when it refuses."""

import json
import logging
import subprocess
import sys

import click
import pytest

from dovetail.cli import main as cli_main
from dovetail.cli.bench.group import bench
from dovetail.errors import ConfigError, DovetailError, EngineDeadError, UnknownNameError


def commands():
    context = click.Context(cli_main.cli)
    for group in (cli_main.cli, bench):
        for name in group.list_commands(context):
            yield group.get_command(context, name)
    yield cli_main.cli


def test_python_dash_m_is_the_same_program():
    done = subprocess.run([sys.executable, "-m", "dovetail", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("dovetail, version 0.")


def test_every_option_has_a_help_line():
    missing = [
        (command.name, option.name)
        for command in commands()
        for option in command.params
        if isinstance(option, click.Option) and not (option.help or "").strip()
    ]
    assert missing == []


def test_every_command_says_what_it_does_like_the_list_does():
    for command in commands():
        assert command.help
    for table in (cli_main.COMMANDS, bench.lazy):
        assert all(line.endswith(".") for _, line in table.values())


def test_help_lists_every_command(capsys):
    assert cli_main.run(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("serve", "chat", "generate", "bench", "plugins", "explain", "doctor"):
        assert f"\n  {name} " in shown


def test_unknown_command_suggests_the_nearest(capsys):
    assert cli_main.run(["sevre"]) == 2
    assert "No such command 'sevre'. Did you mean 'serve'?" in capsys.readouterr().err
    assert cli_main.run(["zzz"]) == 2
    assert "Did you mean" not in capsys.readouterr().err


def test_unknown_option(capsys):
    assert cli_main.run(["plugins", "--jsonn"]) == 2
    assert "--jsonn" in capsys.readouterr().err


@pytest.fixture
def failing(monkeypatch):
    """Make `dovetail plugins` raise what the test gives it."""

    def install(error):
        @click.command()
        def plugins():
            raise error

        monkeypatch.setattr(cli_main.cli, "get_command", lambda ctx, name: plugins)

    return install


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("--x is 1; make it 2."), 2),
        (UnknownNameError("no such thing"), 2),
        (EngineDeadError("gone"), 1),
        (DovetailError("no server"), 1),
    ],
)
def test_deliberate_errors_are_one_message_without_traceback(failing, capsys, error, code):
    failing(error)
    assert cli_main.run(["plugins"]) == code
    captured = capsys.readouterr()
    assert captured.err == f"error: {error}\n"
    assert captured.out == ""


def test_traceback_at_log_level_debug(failing, caplog):
    failing(ConfigError("wrong"))
    with caplog.at_level(logging.DEBUG, logger="dovetail"):
        assert cli_main.run(["plugins"]) == 2
    assert caplog.records[-1].exc_info[0] is ConfigError


def test_other_errors_keep_their_traceback(failing):
    failing(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli_main.run(["plugins"])


def test_interrupt(failing, capsys):
    failing(KeyboardInterrupt())
    assert cli_main.run(["plugins"]) == 130


def test_closed_pipe_is_quiet():
    code = f"{sys.executable} -m dovetail plugins --json | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_global_options_set_the_environment(monkeypatch, capsys):
    for variable in ("DOVETAIL_PLUGINS", "DOVETAIL_DISABLE_PLUGINS", "DOVETAIL_TRACE_HOOKS"):
        monkeypatch.setenv(variable, "")
    assert cli_main.run(["--plugins", "builtin", "--disable-plugins", "tpu", "--trace-hooks", "plugins", "--json"]) == 0
    captured = capsys.readouterr()
    states = {plugin["name"]: plugin["state"] for plugin in json.loads(captured.out)["plugins"]}
    assert states.pop("builtin") == "loaded"
    assert set(states.values()) <= {"disabled"}
    assert "dovetail hook: builtin: + platforms cpu" in captured.err
