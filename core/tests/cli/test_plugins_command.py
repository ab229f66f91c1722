"""`dovetail plugins`."""

import json
import sys

import pytest

from dovetail.cli.main import run
from dovetail.testing.fake_plugins import install


@pytest.fixture
def broken(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    yield install(tmp_path, "broken", "import no_such_module_shown", version="4.2")
    sys.modules.pop("fake_broken_dist_broken", None)


def test_table_shows_what_each_provides_and_why_it_failed(broken, capsys):
    assert run(["plugins"]) == 0
    captured = capsys.readouterr()
    assert "platform: cpu" in captured.out
    assert "attention: cpu, blocked, reference" in captured.out
    assert "plugin 'broken' (dist-broken 4.2) is quarantined: ModuleNotFoundError" in captured.out
    assert "Or leave it out with DOVETAIL_DISABLE_PLUGINS=broken." in captured.out
    assert "Traceback (most recent call last)" in captured.out
    assert captured.err == "", "the table says it; no warning besides"


def test_disabled_plugin_is_shown(broken, capsys, monkeypatch):
    monkeypatch.setenv("DOVETAIL_DISABLE_PLUGINS", "broken")
    assert run(["plugins"]) == 0
    shown = capsys.readouterr().out
    assert "disabled" in shown
    assert "Traceback" not in shown


def test_json_form(broken, capsys):
    assert run(["plugins", "--json"]) == 0
    found = {plugin["name"]: plugin for plugin in json.loads(capsys.readouterr().out)["plugins"]}
    keys = {"name", "distribution", "version", "state", "asked", "error", "remedy", "traceback", "provides"}
    keys |= {"warnings", "seconds"}
    assert all(set(plugin) == keys for plugin in found.values())
    assert found["builtin"]["provides"]["platforms"] == ["cpu"]
    failed = found["broken"]
    assert (failed["distribution"], failed["version"], failed["state"]) == ("dist-broken", "4.2", "quarantined")
    assert "no_such_module_shown" in failed["error"]


def test_wrong_list_is_one_message(broken, capsys, monkeypatch):
    monkeypatch.setenv("DOVETAIL_PLUGINS", "brokne")
    assert run(["plugins"]) == 2
    assert "error: DOVETAIL_PLUGINS names 'brokne'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["plugins", "--json"], ["explain", "--json"], ["doctor", "--json", "--port", "0"]])
def test_what_plugins_print_is_no_part_of_json(tmp_path, monkeypatch, capsys, command):
    monkeypatch.syspath_prepend(tmp_path)
    module = install(tmp_path, "chatty", "print('Thank you for choosing chatty!')")
    run(command)
    sys.modules.pop(module)
    captured = capsys.readouterr()
    assert json.loads(captured.out)
    assert "Thank you for choosing chatty!" in captured.err


def test_odd_names_are_shown_as_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "x[b]", "", distribution="dist-odd", target="fake_odd")
    (tmp_path / "fake_odd.py").write_text("")
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["plugins"]) == 0
    assert "x[b]" in capsys.readouterr().out
    sys.modules.pop("fake_odd")
