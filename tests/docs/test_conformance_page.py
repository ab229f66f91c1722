"""The test file on the page passes under plain pytest, outside of this workspace, and its commands do what it says."""

import json
import re
import subprocess
import sys

import pytest

from dovetail.cli.main import run
from dovetail.testing.conformance import AttentionSuite, scenarios, subject
from dovetail.testing.conformance.catalogue import ALL

PAGE = "docs/plugins/conformance.md"


def test_the_file_on_the_page(read_page, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (file,) = read_page(PAGE).files().values()
    (tmp_path / "test_conformance.py").write_text(file)
    command = [sys.executable, "-m", "pytest", "-q", "-k", "refusals or page_bytes or chunked", "-W", "error"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b1\d passed", done.stdout), done.stdout


def test_the_commands_on_the_page(read_page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text, as_json, as_html = read_page(PAGE).dovetail("conformance")
    assert run(text) == 0
    shown = capsys.readouterr().out
    assert "Plugin 'builtin' conforms." in shown
    assert all(scenario.id in shown for scenario in scenarios(AttentionSuite))
    assert run(as_json) == 0
    (cpu,) = json.loads(capsys.readouterr().out)["parts"]
    assert (cpu["kind"], cpu["name"]) == ("platform", "cpu")
    assert run(as_html) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<h2>attention reference</h2>" in page
    assert not re.search(r"(src|href)=", page), "the page needs no other file"


def test_every_suite_is_on_the_page(read_page):
    assert set(re.findall(r"^\| `(\w+Suite)`", read_page(PAGE).text, re.MULTILINE)) == {suite.__name__ for suite in ALL}


@pytest.mark.parametrize(("page", "plugin"), [("platform", "abacus"), ("attention", "chalk")])
def test_the_examples_of_other_pages_conform(installed, page, plugin, capsys):
    """What authors copy from passes what authors run."""
    installed(f"docs/plugins/{page}.md")
    subject.installed.cache_clear()
    code = run(["conformance", plugin, "--format", "json"])
    subject.installed.cache_clear()
    parts = json.loads(capsys.readouterr().out)["parts"]
    failed = {s["scenario"]: s["reasons"] for part in parts for s in part["scenarios"] if s["outcome"] == "failed"}
    assert failed == {}
    assert code == 0
