"""Real packages: wheels built in the test, installed with pip into a folder, and run by the real command."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

import httpx
import pytest

SMALL = ["--num-threads", "1", "--max-model-len", "256", "--max-num-seqs", "4", "--max-num-batched-tokens", "64"]


@dataclass(frozen=True, kw_only=True)
class Package:
    """A distribution that is to be.

    Attributes:
        files: path -> source, common indentation removed.
        plugins: entry-point name -> module.
        requires: its dependencies.
    """

    name: str
    version: str
    files: Mapping[str, str]
    plugins: Mapping[str, str]
    requires: Sequence[str] = ()

    def build(self, folder: Path) -> Path:
        """Write the wheel."""
        stem = f"{self.name.replace('-', '_')}-{self.version}"
        metadata = [f"Metadata-Version: 2.1\nName: {self.name}\nVersion: {self.version}"]
        metadata += [f"Requires-Dist: {requirement}" for requirement in self.requires]
        points = "\n".join(["[dovetail]", *(f"{name} = {module}" for name, module in self.plugins.items())])
        info = {
            "METADATA": "\n".join(metadata),
            "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any",
            "entry_points.txt": points,
        }
        files = {path: dedent(source) for path, source in self.files.items()}
        files |= {f"{stem}.dist-info/{name}": text + "\n" for name, text in info.items()}
        record = f"{stem}.dist-info/RECORD"
        wheel = folder / f"{stem}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for path, text in files.items():
                archive.writestr(path, text)
            archive.writestr(record, "".join(f"{path},,\n" for path in [*files, record]))
        return wheel


@dataclass(frozen=True)
class Ran:
    """What a command printed, and how it ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Site:
    """A folder of installed packages, beside what the workspace has installed."""

    folder: Path
    variables: Mapping[str, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """That a process runs in."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DOVETAIL_")}
        extra = {"PYTHONPATH": str(self.folder), "COLUMNS": "300", "OMP_NUM_THREADS": "1"}
        return {**kept, **extra, **self.variables}

    def python(self, *arguments: str) -> Ran:
        """Run an interpreter."""
        done = subprocess.run(
            [sys.executable, *arguments],
            env=self.environment(), cwd=self.folder, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        return Ran(done.returncode, done.stdout, done.stderr)

    def dovetail(self, *arguments: str) -> Ran:
        """Run the command in a process of its own."""
        return self.python("-m", "dovetail", *arguments)

    def plugins(self) -> dict[str, dict]:
        """What ``dovetail plugins --json`` says, by name."""
        ran = self.dovetail("plugins", "--json")
        assert ran.code == 0, ran.err
        return {plugin["name"]: plugin for plugin in json.loads(ran.out)["plugins"]}

    def dovetail_all(self, commands: Mapping[str, Sequence[str]]) -> dict[str, Ran]:
        """Run several commands in one process, which imports torch once."""
        code = dedent(
            """
            import contextlib, io, json, sys
            from dovetail.cli.main import run
            results = {}
            for name, arguments in json.load(sys.stdin).items():
                out, err = io.StringIO(), io.StringIO()
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    code = run(arguments)
                results[name] = (code, out.getvalue(), err.getvalue())
            json.dump(results, sys.stdout)
            """
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(commands), env=self.environment(), cwd=self.folder, capture_output=True, text=True,
            timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return {name: Ran(*result) for name, result in json.loads(done.stdout).items()}

    @contextmanager
    def serving(self, *options: str) -> Iterator[Server]:
        """``dovetail serve``, healthy."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = self.folder / "server.log"
        command = [sys.executable, "-m", "dovetail", "serve", "--port", str(port), *SMALL, *options]
        with log.open("w") as output:
            process = subprocess.Popen(command, env=self.environment(), stdout=output, stderr=subprocess.STDOUT)
        server = Server(f"http://127.0.0.1:{port}", log, process)
        try:
            server.wait()
            yield server
        finally:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    log: Path
    process: subprocess.Popen

    def wait(self) -> None:
        """Until it is healthy."""
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass  # it does not listen yet
            time.sleep(0.05)
        raise AssertionError(f"no healthy server:\n{self.log.read_text()}")


@pytest.fixture(scope="session")
def install(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Site]:
    """Build wheels and install them with pip into a new folder."""

    def make(packages: Sequence[Package], variables: Mapping[str, str] | None = None) -> Site:
        folder = tmp_path_factory.mktemp("site")
        wheels = [str(package.build(tmp_path_factory.mktemp("wheel"))) for package in packages]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run(
            [*pip, "--disable-pip-version-check", "--target", str(folder), *wheels], check=True, timeout=120
        )
        return Site(folder, variables or {})

    return make


@pytest.fixture(scope="session")
def install_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Site]:
    """Build a source tree and install it with pip into a new folder."""

    def make(source: Path) -> Site:
        folder = tmp_path_factory.mktemp("site")
        copy = shutil.copytree(source, tmp_path_factory.mktemp("source") / source.name)  # building writes into it
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
        command = [*pip, "--disable-pip-version-check", "--target", str(folder), str(copy)]
        subprocess.run(command, check=True, timeout=120)
        return Site(folder)

    return make


@pytest.fixture(scope="session")
def package() -> type[Package]:
    """:class:`Package`; folders of tests share helpers by fixture."""
    return Package


@pytest.fixture(scope="session")
def small() -> list[str]:
    """Options that make the demo model small."""
    return SMALL
