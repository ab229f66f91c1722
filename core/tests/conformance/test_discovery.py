"""The suite of plugins passes one that commands load, and catches those that load under tests alone."""

from __future__ import annotations

import pytest

from dovetail.plugins.host import PluginHost
from dovetail.testing.conformance import PluginSuite
from dovetail.testing.conformance.run import run
from dovetail.testing.fake_plugins import install

HOOK = """
from dovetail import hookimpl

@hookimpl
def dovetail_register_commands(register):
    pass
"""


@pytest.fixture
def outcome(tmp_path, monkeypatch):
    """Outcome and reason of the suite for a plugin of this name, installed here if it has a source."""
    monkeypatch.syspath_prepend(tmp_path)

    def test(plugin, source=None):
        if source is not None:
            install(tmp_path, plugin, source)
            assert {status.name: status for status in PluginHost().discover(warn=False).plugins}[plugin].well
        (result,) = run({"TestPlugin": type("TestPlugin", (PluginSuite,), {"plugin": plugin})})
        return result.outcome, result.reason

    return test


def test_a_light_plugin_passes(outcome):
    assert outcome("light", HOOK) == ("passed", "")


def test_what_a_test_session_has_loaded_already_is_noticed(outcome):
    verdict, reason = outcome("heavy", "import torch\n" + HOOK)
    assert verdict == "failed"
    assert reason.startswith("plugin.1: for commands, the plugin 'heavy' (dist-heavy 1.0) is quarantined.")
    assert "its plugin module imports torch, which every command would pay for." in reason


def test_a_plugin_that_is_not_installed(outcome):
    verdict, reason = outcome("absent")
    assert verdict == "failed"
    assert reason.startswith("plugin.1: no plugin 'absent' is installed, but builtin, ")


def test_commands_that_start_nothing(outcome, monkeypatch):
    monkeypatch.setenv("DOVETAIL_DISABLE_PLUGINS", "nobody")
    verdict, reason = outcome("builtin")
    assert verdict == "failed"
    assert "plugin.1: `dovetail plugins` fails: error: DOVETAIL_DISABLE_PLUGINS names 'nobody'" in reason
