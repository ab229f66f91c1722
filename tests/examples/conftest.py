"""An environment that has never seen this workspace, with everything installed into it from wheels.

The environment is a new venv whose site-packages hold links to the workspace's third-party packages, each by itself.
So torch need not be downloaded again, pip sees every dependency as installed and checks it, and nothing leads back to
the sources: paths of editable installs lie in files that are not linked, and whatever is called dovetail comes from a
wheel.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
OURS = ("dovetail", "__editable__")
LEFT_OUT = shutil.ignore_patterns("build", "*.egg-info", "__pycache__", ".*_cache")
EXAMPLES = tuple(sorted(folder.name for folder in (ROOT / "examples").iterdir() if folder.is_dir()))
SMALL = ("--num-threads", "1", "--max-model-len", "256", "--max-num-seqs", "4", "--max-num-batched-tokens", "64")


@dataclass(frozen=True)
class Environment:
    """A virtual environment of its own."""

    folder: Path

    @property
    def variables(self) -> dict[str, str]:
        """What an activated shell has, and pip without an index to ask."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("DOVETAIL", "PYTHON", "COV"))}
        return {
            **kept,
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "VIRTUAL_ENV": str(self.folder),
            "COLUMNS": "200",
            "OMP_NUM_THREADS": "1",
            "PIP_NO_INDEX": "1",
            "PIP_NO_BUILD_ISOLATION": "0",  # pip reads this as: no isolation
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_ROOT_USER_ACTION": "ignore",
        }

    def run(self, command: str | list[str], cwd: Path | None = None) -> str:
        """Run a command, or a line of a shell; returns what it prints."""
        done = subprocess.run(
            command,
            shell=isinstance(command, str),
            cwd=cwd or self.folder,
            env=self.variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    @contextlib.contextmanager
    def serve(self, *arguments: str) -> Iterator[str]:
        """``dovetail serve`` until the end of the block; yields its address."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [str(self.folder / "bin/dovetail"), "serve", *arguments, *SMALL, "--port", str(port)]
        log = self.folder / f"log-{port}"
        with log.open("w") as output:
            process = subprocess.Popen(command, env=self.variables, stdout=output, stderr=subprocess.STDOUT)
        url = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + 120
            while not _healthy(url):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield url
            process.terminate()
            assert process.wait(30) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def new_environment(folder: Path) -> Environment:
    """An environment with the third-party packages of this one, and nothing of ours."""
    venv.EnvBuilder(symlinks=True).create(folder)
    (site,) = folder.glob("lib/python*/site-packages")
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if not package.name.startswith(OURS):
            (site / package.name).symlink_to(package)
    for name in ("pip", "pytest"):
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{folder}/bin/python" -m {name} "$@"\n')
        script.chmod(0o755)
    return Environment(folder)


def build_wheels(folder: Path) -> list[Path]:
    """Wheels of the core, of the model families and of every example, from copies of their sources."""
    names = ("core", "plugins/models", *(f"examples/{example}" for example in EXAMPLES))
    copies = {name: folder / "sources" / name for name in names}
    for name, copy in copies.items():
        shutil.copytree(ROOT / name, copy, ignore=LEFT_OUT)
    wheels = folder / "wheels"
    wheels.mkdir()
    # The core's own backend would compile the kernels again; those in the tree are up to date, or no test would pass.
    core = f"from setuptools import build_meta; build_meta.build_wheel({str(wheels)!r})"
    _quietly([sys.executable, "-c", core], copies.pop("core"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-index"]
    _quietly([*pip, "--no-build-isolation", "--wheel-dir", str(wheels), *map(str, copies.values())], folder)
    return sorted(wheels.glob("*.whl"))


def _quietly(command: list[str], cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Built once."""
    return build_wheels(tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory, wheels: list[Path]) -> Environment:
    """With every wheel installed by pip, their dependencies checked."""
    made = new_environment(tmp_path_factory.mktemp("environment"))
    made.run(["pip", "install", "--quiet", "--no-compile", *map(str, wheels)])
    return made


@pytest.fixture(scope="session")
def bare_environment(tmp_path_factory: pytest.TempPathFactory, wheels: list[Path]) -> Environment:
    """With the core and the model families alone: what an author begins with."""
    made = new_environment(tmp_path_factory.mktemp("bare"))
    ours = [str(wheel) for wheel in wheels if wheel.name.startswith(("dovetail_core", "dovetail_models"))]
    made.run(["pip", "install", "--quiet", "--no-compile", *ours])
    return made
