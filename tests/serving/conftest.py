"""A real server on the demo model."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_server(log: Path, *options: str) -> tuple[subprocess.Popen, str]:
    """``dovetail serve`` with its output in ``log``; returns when it is healthy."""
    port = free_port()
    with log.open("w") as output:
        command = [sys.executable, "-m", "dovetail", "serve", "--port", str(port), *options]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return process, url
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"no healthy server after 90 s:\n{log.read_text()}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server with the defaults of ``make serve``."""
    process, url = start_server(tmp_path_factory.mktemp("server") / "log")
    yield url
    process.terminate()
    assert process.wait(30) == 0
