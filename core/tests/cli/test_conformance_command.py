"""`dovetail conformance`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from dovetail.cli.main import run
from dovetail.testing.conformance import PlatformSuite, scenarios, subject
from dovetail.testing.fake_plugins import install

HEAD = """
from dovetail import hookimpl
from dovetail.contracts.platform import Probe
from dovetail.plugins.manifest import AttentionManifest, PlatformManifest
from dovetail.testing.platforms import ReferencePlatform
"""
REGISTER = """
@hookimpl
def dovetail_register_platforms(register):
    manifest = PlatformManifest(
        name={name!r}, summary="For tests.", device_type="cpu", dtypes=("float32",), attention=("reference",)
    )
    register(manifest, {target!r})
"""
PLAIN = REGISTER.format(name="plain", target="dovetail.testing.platforms:ReferencePlatform")
FORGETFUL = (
    """
class Forgetful(ReferencePlatform):
    def memory(self):
        raise OSError("<no> memory & no reason")
"""
    + REGISTER.format(name="forgetful", target="fake_forgetful_dist_forgetful:Forgetful")
)
ABSENT = (
    """
class Absent(ReferencePlatform):
    @classmethod
    def probe(cls):
        return Probe(available=False, reason="no abacus on the bus; install its driver")
"""
    + REGISTER.format(name="absent", target="fake_absent_dist_absent:Absent").replace('("reference",)', '("beads",)')
    + """
@hookimpl
def dovetail_register_attention_backends(register):
    manifest = AttentionManifest(name="beads", summary="For tests.", device_types=("cpu",), dtypes=("float32",))
    register(manifest, "dovetail.platforms.cpu.reference_attention:ReferenceAttention")
"""
)


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Install a plugin of this name and source."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    subject.installed.cache_clear()
    modules = []
    yield lambda name, source: modules.append(install(tmp_path, name, HEAD + source, version="4.2"))
    subject.installed.cache_clear()
    for module in modules:
        sys.modules.pop(module, None)


def test_a_plugin_that_conforms(plugin, capsys):
    plugin("plain", PLAIN)
    assert run(["conformance", "plain"]) == 0
    shown = capsys.readouterr().out
    assert "plain  (dist-plain 4.2, suites of dovetail-core" in shown
    passed = re.search(r"platform 'plain': (\d+) passed, 0 failed, 0 skipped", shown)
    assert passed is not None
    assert int(passed[1]) >= len(scenarios(PlatformSuite))
    assert "Plugin 'plain' conforms." in shown


def test_a_plugin_that_does_not(plugin, capsys):
    plugin("forgetful", FORGETFUL)
    assert run(["conformance", "forgetful", "--format", "json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["plugin"], report["distribution"], report["conforms"]) == ("forgetful", "dist-forgetful", False)
    (part,) = report["parts"]
    failed = {found["scenario"]: found["reasons"] for found in part["scenarios"] if found["outcome"] == "failed"}
    assert failed.pop("platform.4") == ["OSError: <no> memory & no reason"]
    assert set(failed) == {"platform.14", "platform.15", "platform.16"}, "those that load an engine"
    assert run(["conformance", "forgetful"]) == 1
    shown = capsys.readouterr().out
    assert "Plugin 'forgetful' does not conform." in shown
    assert "TestForgetfulPlatformSuite.test_memory\n  OSError: <no> memory & no reason" in shown


def test_html(plugin, tmp_path, capsys):
    plugin("forgetful", FORGETFUL)
    file = tmp_path / "report.html"
    assert run(["conformance", "forgetful", "--format", "html", "--output", str(file)]) == 1
    assert f"does not conform. Report: {file}" in capsys.readouterr().err
    page = file.read_text()
    assert "OSError: &lt;no&gt; memory &amp; no reason" in page
    assert "Traceback" in page or "def memory" in page, "the whole story is there"
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.cells["platform.4"] == "failed"
    assert parser.cells["platform.1"] == "passed"


class Balanced(HTMLParser):
    """Checks that tags are closed, and reads the table."""

    def __init__(self):
        super().__init__()
        self.open, self.row, self.cells = [], [], {}

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.row = []
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "tr" and len(self.row) > 2:
            self.cells[self.row[0]] = self.row[-2]

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.row.append(data)


def test_a_platform_that_is_not_here(plugin, capsys):
    plugin("absent", ABSENT)
    assert run(["conformance", "absent"]) == 1
    shown = capsys.readouterr().out
    assert "not available here: no abacus on the bus; install its driver" in shown
    assert re.search(r"platform 'absent': 4 passed, 0 failed, \d+ skipped", shown), "what needs no device was tested"
    assert re.search(r"attention 'beads': 0 passed, 0 failed, \d+ skipped", shown)
    assert "does not conform" not in shown
    assert "Plugin 'absent' could not be tested in full." in shown


def test_a_target_that_cannot_be_imported(plugin, capsys):
    plugin("gone", REGISTER.format(name="gone", target="no_such_module:Gone"))
    assert run(["conformance", "gone"]) == 1
    assert "cannot be imported from no_such_module:Gone" in capsys.readouterr().out


def test_choosing(plugin, capsys):
    plugin("plain", PLAIN)
    assert run(["conformance", "plain", "--kind", "attention"]) == 2
    error = capsys.readouterr().err
    assert "registers nothing of kind attention. It registers platform 'plain'." in error
    assert run(["conformance", "plain", "--name", "plian"]) == 2
    assert "registers nothing of name plian" in capsys.readouterr().err


def test_unknown_plugin(plugin, capsys):
    plugin("plain", PLAIN)
    assert run(["conformance", "plian"]) == 2
    assert "No plugin 'plian' is installed. Did you mean 'plain'?" in capsys.readouterr().err


def test_a_plugin_that_registers_nothing(plugin, capsys):
    plugin("empty", "")
    assert run(["conformance", "empty"]) == 2
    assert "registers nothing, so there is nothing to test." in capsys.readouterr().err


def test_broken_and_disabled_plugins(plugin, capsys, monkeypatch):
    plugin("broken", "import no_such_module_shown")
    assert run(["conformance", "broken"]) == 2
    assert "cannot be tested: it is quarantined. ModuleNotFoundError" in capsys.readouterr().err
    monkeypatch.setenv("DOVETAIL_DISABLE_PLUGINS", "broken")
    assert run(["conformance", "broken"]) == 2
    assert "is switched off" in capsys.readouterr().err


def test_a_plugin_that_is_too_heavy_for_commands(plugin, tmp_path):
    plugin("heavy", "import torch\n" + PLAIN)
    command = [sys.executable, "-m", "dovetail", "conformance", "heavy"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout
    assert "cannot be tested: it is quarantined." in done.stderr
    assert "its plugin module imports torch" in done.stderr


def test_without_pytest(monkeypatch, capsys):
    monkeypatch.setattr("dovetail.cli.conformance.find_spec", lambda name: None)
    assert run(["conformance", "builtin"]) == 2
    assert "pip install 'dovetail-core[testing]'" in capsys.readouterr().err


def test_report_that_cannot_be_written_is_refused_before_anything_runs(tmp_path, capsys):
    assert run(["conformance", "no-such-plugin", "--output", str(tmp_path / "lost" / "report.html")]) == 2
    assert "report.html cannot be written (No such file or directory); name another file." in capsys.readouterr().err
