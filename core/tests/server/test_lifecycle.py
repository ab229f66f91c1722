"""Start, drain and death of the server's two processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import pytest

HERE = Path(__file__).parent
ENDLESS = {"prompt": "say.", "max_tokens": 3000, "ignore_eos": True, "temperature": 0}


def is_alive(pid):
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pid, seconds=5):
    deadline = time.monotonic() + seconds
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.02)


def in_background(function):
    """Run it in a thread; the list gets its result."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    return thread, results


def test_while_the_model_loads(start):
    server = start(wait=False, config={"load_seconds": 1.5})
    assert server.wait_for_health(503).json() == {"status": "starting", "plugins": []}
    assert server.http.get("/version").status_code == 200
    assert "dovetail:engine_up 0.0" in server.http.get("/metrics").text
    refused = server.post("/v1/completions", prompt="k")
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert server.http.get("/v1/models").status_code == 503
    server.wait_for_health(200)
    assert server.complete("k", max_tokens=1)["choices"][0]["text"] == "l"


def test_a_signal_while_the_model_loads_ends_at_once(start):
    server = start(wait=False, config={"load_seconds": 60})
    server.wait_for_health(503)
    (engine,) = server.engine_pids()
    assert server.terminate(5) == 0
    wait_until_gone(engine)


@pytest.mark.parametrize(
    ("config", "code", "words"),
    [
        ({"refuse": "Cannot run it: --dtype is odd."}, 1, "error: Cannot run it: --dtype is odd."),
        ({"misfit": "Tensor x is missing."}, 1, "error: Tensor x is missing."),
        ({"vanish": 7}, 1, "The engine process ended with exit code 7."),
        ({"nonsense": 1}, 1, "TypeError"),
    ],
)
def test_refusals_and_failures_of_the_engine_reach_the_operator(start, config, code, words):
    server = start(wait=False, config=config)
    assert server.process.wait(20) == code
    assert words in server.log


def test_a_missing_checkpoint_is_refused(tmp_path):
    options = {"engine": {"model": str(tmp_path)}, "server": {"port": 0}}
    result = subprocess.run(
        [sys.executable, str(HERE / "fake_server.py"), json.dumps(options)],
        capture_output=True,
        text=True,
        timeout=20,
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )
    assert result.returncode == 1
    assert "config.json" in result.stderr


def test_a_taken_port_is_refused_before_anything_loads(start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        begin = time.monotonic()
        server = start(wait=False, port=taken.getsockname()[1], config={"load_seconds": 60})
        assert server.process.wait(20) == 1
    assert time.monotonic() - begin < 10
    assert "Cannot listen on 127.0.0.1" in server.log
    assert "--port" in server.log


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(start):
    server = start(config={"executor": {"delay": 0.02}})
    body = {**ENDLESS, "max_tokens": 60}
    with server.begun(max_tokens=60) as lines:
        whole, answers = in_background(lambda: server.post("/v1/completions", **body))
        server.wait_for_metric("dovetail:num_requests_running", 2.0)
        (engine,) = server.engine_pids()
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_for_health(503).json() == {"status": "draining", "plugins": []}
        refused = server.post("/v1/completions", prompt="k")
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert [line for line in lines if line][-1] == "data: [DONE]"
    whole.join()
    assert answers[0].json()["usage"]["completion_tokens"] == 60
    assert server.process.wait(10) == 0
    wait_until_gone(engine)
    assert "Traceback" not in server.log


def test_requests_that_outlast_the_drain_are_told(start):
    server = start(drain_timeout=0.3)
    with server.begun() as lines:
        whole, answers = in_background(lambda: server.post("/v1/completions", **ENDLESS))
        server.wait_for_metric("dovetail:num_requests_running", 2.0)
        begin = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        last = [line for line in lines if line][-1]
    whole.join()
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "service_unavailable"
    assert answers[0].status_code == 503
    assert server.process.wait(10) == 0
    assert time.monotonic() - begin < 5
    assert "WARNING dovetail.server: A stream ended early: The server is shutting down" in server.log


def test_a_second_signal_does_not_wait(start):
    server = start(drain_timeout=60)
    with server.begun():
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_health(503)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 0


@pytest.mark.parametrize("way", ["crash", "kill"])
def test_the_death_of_the_engine(start, way):
    server = start()
    (engine,) = server.engine_pids()
    sockets = set(Path(tempfile.gettempdir()).glob("dovetail-*"))
    with server.begun() as lines:
        whole, answers = in_background(lambda: server.post("/v1/completions", **ENDLESS))
        server.wait_for_metric("dovetail:num_requests_running", 2.0)
        if way == "crash":
            culprit = server.post("/v1/completions", prompt=[0], max_tokens=1)
            assert culprit.status_code == 500
        else:
            os.kill(engine, signal.SIGKILL)
        last = [line for line in lines if line][-1]
        health = server.http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "dead")
        crash, kill = "RuntimeError: the prompt ends with <crash>.", "The engine process ended by SIGKILL. Unless"
        assert health.json()["cause"].startswith(crash if way == "crash" else kill)
        assert ("lower --kv-cache-memory" in health.json()["cause"]) == (way != "crash")
        assert server.post("/v1/completions", prompt="k").status_code == 500
    whole.join()
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == ("engine_dead", "server_error")
    assert answers[0].status_code == 500
    assert answers[0].json()["error"]["code"] == "engine_dead"
    assert server.process.wait(10) == 1
    assert ("the prompt ends with <crash>" if way == "crash" else "SIGKILL") in server.log
    assert len(sockets - set(Path(tempfile.gettempdir()).glob("dovetail-*"))) >= 1


def test_the_engine_never_outlives_the_server(start):
    server = start()
    (engine,) = server.engine_pids()
    arguments = Path(f"/proc/{engine}/cmdline").read_bytes().split(b"\0")
    folder = next(Path(part.decode()) for part in arguments if b"dovetail-" in part and part.startswith(b"/"))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder.exists()
    server.process.kill()
    server.process.wait()
    wait_until_gone(engine)
    assert not folder.exists()


def test_ports_are_free_again_after_a_clean_end(start):
    first = start()
    with httpx.Client(base_url=first.url) as client:
        client.get("/health")
        assert first.terminate(5) == 0
    second = start(port=first.port)
    assert second.complete("k", max_tokens=1)
