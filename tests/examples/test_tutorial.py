"""The tutorial, followed to the letter: its files written, its commands run, where nothing of ours is around."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs/tutorial.md"
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def parts(console):
    """The commands of a block, each with the lines that the page shows of its output."""
    for part in re.split(r"^\$ ", console, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        yield command, shown.splitlines()


class Reader:
    """Someone who does what the page says."""

    def __init__(self, environment, folder, servers):
        self.environment = environment
        self.folder = folder
        self.url = ""
        self._servers = servers

    def write(self, name, text):
        file = self.folder / name
        assert file.exists(), f"{name} is shown before it exists"
        file.write_text(text, encoding="utf-8")

    def do(self, command, shown):
        words = shlex.split(command)
        if words[0] == "cd":
            self.folder = self.folder / words[1]
        elif words[:2] == ["dovetail", "serve"]:
            self.url = self._servers.enter_context(self.environment.serve(*words[2:]))
        else:
            self._run(command.replace("http://127.0.0.1:8000", self.url or "nothing serves"), shown)

    def _run(self, command, shown):
        done = subprocess.run(
            command,
            shell=True,
            cwd=self.folder,
            env=self.environment.variables,
            capture_output=True,
            text=True,
            check=False,
        )
        printed = done.stdout + done.stderr
        fails = any(line.endswith(" failed") for line in shown)
        assert (done.returncode != 0) == fails, f"{command}\n{printed}"
        for line in shown:
            assert line in printed, f"{command}\n{line!r} is not in\n{printed}"


@pytest.mark.slow
def test_the_tutorial(bare_environment, tmp_path):
    with contextlib.ExitStack() as servers:
        reader = Reader(bare_environment, tmp_path, servers)
        for language, title, body in FENCE.findall(PAGE.read_text(encoding="utf-8")):
            if title:
                reader.write(title, body)
                continue
            assert language == "console"
            for command, shown in parts(body):
                reader.do(command, shown)
        assert list(tmp_path.glob("dovetail-slate/dist/dovetail_slate-0.1.0-*.whl"))
        assert (tmp_path / "dovetail-slate/report.html").exists()
