"""Pages of the documentation, taken at their word: their files are written down, their commands run."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch

from dovetail.cli.main import run

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

_FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Page:
    """One markdown file."""

    path: Path
    text: str

    @classmethod
    def read(cls, name: str) -> Page:
        path = ROOT / name
        return cls(path, path.read_text(encoding="utf-8"))

    def files(self) -> dict[str, str]:
        """Blocks with a title, by it."""
        return {title: body for _, title, body in _FENCE.findall(self.text) if title}

    def blocks(self, language: str) -> list[str]:
        """Blocks of a language that have no title."""
        return [body for found, title, body in _FENCE.findall(self.text) if found == language and not title]

    def commands(self) -> list[str]:
        """Lines after a prompt in blocks of the console."""
        lines = (line for block in self.blocks("console") for line in block.splitlines())
        return [line[2:] for line in lines if line.startswith("$ ")]

    def dovetail(self, command: str) -> list[list[str]]:
        """The arguments of every ``dovetail COMMAND`` on the page."""
        words = [shlex.split(line) for line in self.commands()]
        return [line[1:] for line in words if line[:2] == ["dovetail", command]]


def install(page: Page, site: Path) -> None:
    """Write the page's files into ``site``, with the metadata that pip would write from its pyproject.toml."""
    files = page.files()
    for name, body in files.items():
        file = site / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(body, encoding="utf-8")
    project = tomllib.loads(files["pyproject.toml"])["project"]
    name, version = project["name"], project["version"]
    metadata = site / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    points = "".join(f"{key} = {value}\n" for key, value in project["entry-points"]["dovetail"].items())
    (metadata / "entry_points.txt").write_text(f"[dovetail]\n{points}")


class Installed:
    """A page whose files are on ``sys.path``."""

    def __init__(self, page: Page, site: Path) -> None:
        self.page = page
        self.site = site

    def dovetail(self, *arguments: str) -> str:
        """Run a command in this process; returns what it prints."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = run(arguments)
        assert code == 0, f"dovetail {shlex.join(arguments)} exited with {code}"
        return printed.getvalue()

    def python(self, name: str, *arguments: str) -> dict[str, object]:
        """Run one of the page's scripts in this process; returns its names."""
        before = sys.argv
        sys.argv = [name, *arguments]
        try:
            return runpy.run_path(str(self.site / name), run_name="__main__")
        finally:
            sys.argv = before


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Installed]]:
    """Install a page as a plugin for the length of a test."""
    for variable in ("DOVETAIL_PLUGINS", "DOVETAIL_DISABLE_PLUGINS", "DOVETAIL_TRACE_HOOKS"):
        monkeypatch.delenv(variable, raising=False)
    modules, threads = set(sys.modules), torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: more threads only wait for each other

    def install_page(name: str) -> Installed:
        page = Page.read(name)
        install(page, tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        return Installed(page, tmp_path)

    yield install_page
    torch.set_num_threads(threads)
    for name in set(sys.modules) - modules:
        origin = getattr(sys.modules[name], "__file__", None) or ""
        if origin.startswith(str(tmp_path)):
            del sys.modules[name]


@dataclass(frozen=True)
class Served:
    """A running server.

    Attributes:
        url: where it listens.
        log: what it prints.
        process: ``dovetail serve``.
    """

    url: str
    log: Path
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def serving(arguments: list[str], log: Path, **variables: str) -> Iterator[Served]:
    """A server with these arguments, from when it is healthy; it has drained and ended when the block is left."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dovetail", *arguments, "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1", **variables},
        )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):  # it does not listen yet
            if httpx.get(f"{url}/health").status_code == 200:
                break
        time.sleep(0.05)
    else:
        process.kill()
        raise AssertionError(f"no healthy server:\n{log.read_text()}")
    yield Served(url, log, process)
    process.terminate()
    assert process.wait(30) == 0, log.read_text()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The server of the page on platforms, exactly as it says. Every page that needs a server uses this one."""
    folder = tmp_path_factory.mktemp("served")
    page = Page.read("docs/plugins/platform.md")
    install(page, folder)
    (arguments,) = page.dovetail("serve")
    with serving(arguments, folder / "log", PYTHONPATH=str(folder)) as served:
        yield served


@pytest.fixture(scope="session")
def serve() -> Callable[..., contextlib.AbstractContextManager[Served]]:
    """:func:`serving`, for a page that shows what a server prints."""
    return serving


@pytest.fixture(scope="session")
def read_page() -> Callable[[str], Page]:
    """:meth:`Page.read`; folders of tests share helpers by fixture."""
    return Page.read
