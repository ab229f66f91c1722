"""``dovetail bench startup``: from the command to the first token."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dovetail.cli import http, log
from dovetail.cli.bench import report
from dovetail.cli.options import engine_command, json_option
from dovetail.cli.section_options import EngineCommand
from dovetail.errors import DovetailError
from dovetail.options import EngineOptions, arguments

if TYPE_CHECKING:
    import httpx

_IMPORT = "import time; t = time.perf_counter(); import dovetail; print(time.perf_counter() - t)"
_POLL_SECONDS = 0.01


@click.command(cls=EngineCommand)
@engine_command
@click.option(
    "--runs", type=click.IntRange(1), default=1, show_default=True, help="Servers started, one by one."
)
@click.option(
    "--timeout", type=float, default=300.0, show_default=True, help="Seconds that a start may take."
)
@json_option
def startup(engine: EngineOptions, runs: int, timeout: float, log_level: str, as_json: bool) -> None:
    """Start `dovetail serve`, and time it to the first /health 200 and to the first token.

    With several runs, the medians.
    """
    log.set_up(log_level)
    imports = [_import_seconds() for _ in range(runs)]
    starts = [_start_seconds(engine, timeout) for _ in range(runs)]
    numbers: dict[str, float | int | str] = {
        "runs": runs,
        "import_seconds": report.percentile(imports, 50),
        "health_seconds": report.percentile([health for health, _ in starts], 50),
        "first_token_seconds": report.percentile([token for _, token in starts], 50),
    }
    report.show("start-up", numbers, as_json)


def _import_seconds() -> float:
    """Seconds that ``import dovetail`` takes in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True)
    return float(done.stdout)


def _start_seconds(engine: EngineOptions, timeout: float) -> tuple[float, float]:
    """Seconds from spawning a server to its first /health 200, and to its first token."""
    import httpx

    port = _free_port()
    command = [sys.executable, "-m", "dovetail", "serve", "--port", str(port), *arguments(engine)]
    environment = {name: value for name, value in os.environ.items() if name != "DOVETAIL_API_KEY"}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        with (
            output.open("wb") as stream,
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=timeout) as client,
        ):
            started = time.perf_counter()
            server = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
            try:
                _await_health(server, client, started + timeout, output)
                health = time.perf_counter() - started
                _first_token(client)
                return health, time.perf_counter() - started
            finally:
                server.terminate()
                server.wait(timeout=60)


def _await_health(
    server: subprocess.Popen[bytes], client: httpx.Client, deadline: float, output: Path
) -> None:
    import httpx

    while time.perf_counter() < deadline:
        if server.poll() is not None:
            tail = output.read_text(errors="replace")[-2000:].strip()
            raise DovetailError(
                f"The server ended with exit code {server.returncode} before it was ready:\n{tail}"
            )
        with contextlib.suppress(httpx.HTTPError):
            if client.get("/health").status_code == 200:
                return
        time.sleep(_POLL_SECONDS)
    raise DovetailError("The server was not ready in time; raise --timeout.")


def _first_token(client: httpx.Client) -> None:
    model = client.get("/v1/models").json()["data"][0]["id"]
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 1}
    response = client.post("/v1/completions", json=body)
    if response.status_code != 200:
        raise http.refusal(response.status_code, response.text)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
