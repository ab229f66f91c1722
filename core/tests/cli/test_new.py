"""``dovetail new``: what it writes works at once, and names that cannot work are refused."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib

import click
import pytest

from dovetail.cli.main import run
from dovetail.cli.new import KINDS, renamed
from dovetail.plugins.host import PluginHost

NAME = "blank-page"
REGISTRIES = {
    "platform": "platforms", "attention": "attention", "model": "models", "quant": "quant", "specdec": "spec_decoders",
    "command": "commands",
}  # fmt: skip


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes a package, and makes it discoverable as ``pip install -e`` would; returns its folder."""

    def make(kind):
        folder = tmp_path / "package"
        assert run(["new", kind, NAME, "--path", str(folder)]) == 0
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        metadata = folder / "src" / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
        points = "".join(f"{name} = {target}\n" for name, target in project["entry-points"]["dovetail"].items())
        (metadata / "entry_points.txt").write_text(f"[dovetail]\n{points}")
        monkeypatch.syspath_prepend(folder / "src")
        importlib.invalidate_caches()
        return folder

    modules = set(sys.modules)
    yield make
    for name in set(sys.modules) - modules:
        if name.startswith("dovetail_blank_page"):
            del sys.modules[name]


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_writes_is_found_and_clean(kind, made, capsys):
    folder = made(kind)
    registries = PluginHost().discover().registries
    entry = registries.by_kind()[REGISTRIES[kind]].get(NAME)
    assert entry.owner == f"plugin '{NAME}' (dovetail-{NAME} 0.1.0)"
    target = entry.load()
    assert isinstance(target, click.Command) if kind == "command" else target.__name__.startswith("BlankPage")
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc"]
    assert not [file for file in files if "sketch" in (file.name + file.read_text()).lower()]
    suites = (folder / "tests/test_conformance.py").read_text()
    assert f'class TestPlugin(PluginSuite):\n    plugin = "{NAME}"\n' in suites
    capsys.readouterr()
    assert run(shlex.split(KINDS[kind].format(name=NAME))) == 0
    assert NAME in capsys.readouterr().out
    clean = [sys.executable, "-m", "ruff", "check", "--no-cache", str(folder)]
    done = subprocess.run(clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def own_tests(folder):
    """What becomes of the package's tests in a process of their own."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:asyncio", "-p", "no:cacheprovider"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_its_own_tests_pass_at_once(kind, made):
    done = own_tests(made(kind))
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


def test_its_own_tests_notice_what_commands_refuse(made):
    folder = made("command")
    plugin = folder / "src/dovetail_blank_page/plugin.py"
    plugin.write_text("import torch\n" + plugin.read_text())
    done = own_tests(folder)
    assert done.returncode == 1, done.stdout
    assert re.search(r"plugin\.1: .* is quarantined\. .* imports torch", done.stdout), done.stdout
    assert re.search(r"\b1 failed, [1-9]\d* passed", done.stdout), done.stdout


def test_it_says_what_it_wrote_and_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["new", "specdec", NAME]) == 0
    printed = capsys.readouterr().out
    files = sorted(str(f.relative_to(tmp_path / "dovetail-blank-page")) for f in tmp_path.rglob("*") if f.is_file())
    assert files == [line.strip() for line in printed.splitlines()[1 : 1 + len(files)]]
    assert "cd dovetail-blank-page" in printed
    assert f"dovetail conformance {NAME}" in printed
    assert f"""dovetail explain --speculative-config '{{"method": "{NAME}"}}'""" in printed


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert run(["new", "quant", NAME, "--path", str(tmp_path)]) == 2
    assert "not empty; nothing was written" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(["new", "quant", NAME, "--path", str(tmp_path / "file" / "folder")]) == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("My_Chip2", "'my-chip2' would do"),
        ("dovetail-abacus", "leave out the prefix"),
        ("2fast", "'fast' would do"),
        ("a--b", "'a-b' would do"),
        ("x" * 41, "at most 40"),
        ("…", "beginning with a letter."),
        ("builtin", "taken by the installed plugin 'builtin' (dovetail-core"),
        ("cpu", "taken by the installed plugin 'builtin' (dovetail-core"),
    ],
)
def test_names_that_cannot_be(name, reason, tmp_path, capsys):
    assert run(["new", "platform", name, "--path", str(tmp_path / "package")]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "package").exists()


def test_each_form_of_the_name():
    assert renamed("dovetail_sketch.x:SketchPlatform 'sketch'", "my-chip2") == (
        "dovetail_my_chip2.x:MyChip2Platform 'my-chip2'"
    )
