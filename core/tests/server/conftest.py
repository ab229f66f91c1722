"""A real server process over a fake engine process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

HERE = Path(__file__).parent
SPECIAL = ["<crash>", "<s>", "</s>", "<pad>"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if not loop.last or add_generation_prompt %}"
    "{{ '\n' }}{% endif %}{% endfor %}{% if tools %}[{{ tools | length }} tools]{% endif %}"
    "{% if mood %}[{{ mood }}]{% endif %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def byte_characters():
    """The character that a byte-level tokenizer writes for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


def write_checkpoint(folder, **config):
    """One token per byte; ``config`` is for the fake engine."""
    characters = byte_characters()
    vocab = {token: i for i, token in enumerate(SPECIAL)}
    vocab.update({characters[byte]: len(SPECIAL) + byte for byte in range(256)})
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    files = {
        "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE},
        "generation_config.json": {"temperature": 0.8, "top_p": 0.95, "eos_token_id": 2},
        "config.json": config,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class LiveServer:
    """A server process, a client for it, and its log."""

    def __init__(self, folder, options):
        self.port = options.get("port") or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = folder / "server.log"
        arguments = {"engine": {"model": str(folder)}, "server": {**options, "port": self.port}}
        environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONWARNINGS": "default"}
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "fake_server.py"), json.dumps(arguments)],
                stdout=log,
                stderr=log,
                env=environment,
            )
        self.http = httpx.Client(base_url=self.url, timeout=30)

    @property
    def log(self):
        return self.log_path.read_text()

    def wait_for_health(self, status=200, seconds=30):
        """Until /health answers ``status``."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                response = self.http.get("/health")
            except httpx.TransportError:
                response = None
            if response is not None and response.status_code == status:
                return response
            time.sleep(0.02)
        raise AssertionError(f"no {status} from /health (exit code {self.process.poll()}):\n{self.log}")

    def post(self, path, **body):
        return self.http.post(path, json=body)

    def complete(self, prompt="say.", **fields):
        response = self.post("/v1/completions", **{"prompt": prompt, "temperature": 0, **fields})
        assert response.status_code == 200, response.text
        return response.json()

    def chat(self, text="say.", **fields):
        messages = [{"role": "user", "content": text}]
        response = self.post("/v1/chat/completions", **{"messages": messages, "temperature": 0, **fields})
        assert response.status_code == 200, response.text
        return response.json()

    def events(self, path, **body):
        """The data of a stream's events, the last one included."""
        with self.http.stream("POST", path, json={"temperature": 0, "stream": True, **body}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in response.iter_lines() if line]
        assert all(line.startswith("data: ") for line in lines), lines
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    @contextmanager
    def begun(self, **fields):
        """An endless stream whose first event has come; yields its further lines."""
        body = {"prompt": "say.", "max_tokens": 3000, "ignore_eos": True, "temperature": 0, **fields}
        with self.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            yield lines

    def metric(self, name, labels=""):
        """One sample of /metrics; None if there is none."""
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(f"{name}{labels} "):
                return float(line.rpartition(" ")[2])
        return None

    def wait_for_metric(self, name, value, seconds=10):
        deadline = time.monotonic() + seconds
        while (seen := self.metric(name)) != value:
            assert time.monotonic() < deadline, f"{name} is {seen}, not {value}"
            time.sleep(0.01)

    def engine_pids(self):
        """The engine process, as long as it lives."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children]

    def terminate(self, seconds=20):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def close(self):
        self.http.close()
        if self.process.poll() is None:
            self.terminate()


@contextmanager
def running(folder, *, wait=True, config=None, **options):
    """A server of its own, gone at the end."""
    server = LiveServer(write_checkpoint(folder, **(config or {})), {"served_model_name": "fake", **options})
    try:
        if wait:
            server.wait_for_health()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One server for all tests that leave it as it was."""
    with running(tmp_path_factory.mktemp("server"), max_body_mb=0.5) as server:
        yield server
        assert server.terminate() == 0, server.log
        assert "Traceback" not in server.log, server.log


@pytest.fixture
def start(tmp_path):
    """``start(**options)``: a server of the test's own."""
    stack = []

    def begin(*, wait=True, config=None, **options):
        folder = tmp_path / str(len(stack))
        folder.mkdir()
        context = running(folder, wait=wait, config=config, **options)
        stack.append(context)
        return context.__enter__()

    yield begin
    for context in reversed(stack):
        context.__exit__(None, None, None)
