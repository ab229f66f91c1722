"""`dovetail doctor`, in good health and with one thing after the other broken."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from dovetail import checkpoint
from dovetail.cli.doctor import software
from dovetail.cli.doctor.command import CHECKS
from dovetail.cli.main import run
from dovetail.contracts.platform import MemoryInfo
from dovetail.platforms.cpu.platform import CpuPlatform
from dovetail.testing.fake_plugins import install

DEMO = checkpoint.demo("dovetail_models:checkpoints/fable-4m")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No variables of the machine, and no thread settings left behind."""
    for name in [name for name in os.environ if name.startswith("DOVETAIL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(CpuPlatform, "__init__", lambda self, config: None)


@pytest.fixture
def examine(capsys):
    """Run the command; its exit code, and its lines by check."""

    def run_it(*words):
        given = words if "--port" in words else ("--port", "0", *words)
        code = run(["doctor", *map(str, given), "--json"])
        lines = json.loads(capsys.readouterr().out)["checks"]
        return code, {name: [line for line in lines if line["check"] == name] for name in CHECKS}

    return run_it


@pytest.fixture
def model(tmp_path):
    """A copy of the demo checkpoint that may be broken."""
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    return folder


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the path for made-up plugins."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith("fake_"):
            del sys.modules[name]


def texts(lines, level):
    return [f"{line['found']} {line['remedy']}" for line in lines if line["level"] == level]


def only(lines, level):
    (text,) = texts(lines, level)
    return text


def test_all_is_well(examine, capsys):
    code, found = examine()
    assert code == 0
    assert all(found.values()), "every check has a line"
    assert {line["level"] for lines in found.values() for line in lines} <= {"ok", "warning"}
    assert "fable-4m: LlamaForCausalLM" in only(found["model"], "ok")
    assert "8192 tokens" in only(found["tokenizer"], "ok")
    assert "platform cpu, model llama, attention cpu, quantization none;" in only(found["options"], "ok")


def test_the_report_for_people(capsys):
    assert run(["doctor", "--port", "0", "--attention", "nope"]) == 1
    shown = capsys.readouterr().out
    assert "\nproblem  options          No attention backend is named 'nope'." in shown
    assert "→ Nearest that works: --attention " in shown
    assert shown.rstrip().splitlines()[-1].startswith("1 problem")


def test_every_check_is_documented():
    page = (Path(__file__).parents[2] / "docs/operating.md").read_text()
    section = page.partition("## Doctor")[2].partition("\n## ")[0]
    assert all(f"`{name}`" in section for name in CHECKS)


# surroundings


def test_variable_that_nothing_reads(examine, monkeypatch):
    monkeypatch.setenv("DOVETAIL_PLUGNS", "models")
    code, found = examine()
    assert code == 0
    expected = "DOVETAIL_PLUGNS is set, and nothing reads it. Did you mean 'DOVETAIL_PLUGINS'?"
    assert expected in only(found["variables"], "warning")


def test_variable_with_a_wrong_value(examine, monkeypatch):
    monkeypatch.setenv("DOVETAIL_PLUGNS", "models")
    monkeypatch.setenv("DOVETAIL_TRACE_HOOKS", "yes")
    code, found = examine()
    assert code == 1
    assert only(found["variables"], "problem").startswith("DOVETAIL_TRACE_HOOKS is 'yes'; set it to 0 or 1.")
    assert texts(found["variables"], "warning"), "what was found before is kept"
    assert texts(found["port"], "ok"), "the other checks are made"


def test_list_that_names_no_plugin(examine, monkeypatch):
    monkeypatch.setenv("DOVETAIL_PLUGINS", "modles")
    code, found = examine()
    assert code == 1
    assert "DOVETAIL_PLUGINS names 'modles', but no such plugin" in only(found["plugins"], "problem")
    assert found["model"] == [], "nothing to add"


def test_folder_for_sockets(examine, monkeypatch, tmp_path):
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    code, found = examine()
    assert code == 1
    assert "too long for the engine's sockets; set TMPDIR" in only(found["temporary files"], "problem")


def test_full_disks(examine, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 1 << 40, 1 << 20))
    code, found = examine()
    assert code == 0
    assert "has 1.0 MiB left" in only(found["temporary files"], "warning")
    assert "set HF_HOME to a larger disk" in only(found["downloads"], "warning")


def test_low_limits(examine, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 4096))
    code, found = examine()
    assert code == 0
    files, space, data = texts(found["limits"], "warning")
    assert "1024 open files per process" in files
    assert "`ulimit -n 4096`" in files
    assert "address space is limited" in space
    assert "data is limited" in data


# software


def test_broken_torch_is_one_problem(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so: cannot open shared object file')")
    done = subprocess.run(
        [sys.executable, "-m", "dovetail", "doctor", "--port", "0", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        timeout=60,
    )
    assert done.returncode == 1, done.stderr
    lines = json.loads(done.stdout)["checks"]
    (broken,) = [line for line in lines if line["level"] == "problem"]
    assert broken["check"] == "torch"
    assert "ImportError: libtorch_cpu.so: cannot open" in broken["found"]
    assert broken["remedy"] == "Run: pip install --force-reinstall torch"
    skipped = {line["check"] for line in lines if "not checked" in line["found"]}
    assert skipped == {"platforms", "weights", "options", "memory"}
    assert {line["check"] for line in lines if line["level"] == "ok"} >= {"plugins", "model", "tokenizer", "port"}


def test_distribution_whose_dependencies_are_not_met(examine, site):
    install(site, "needy", "", version="4.2")
    metadata = site / "dist_needy-4.2.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text() + "Requires-Dist: no-such-thing>=3\n")
    code, found = examine()
    assert code == 1
    text = only(found["distributions"], "problem")
    assert text == "dist-needy 4.2 needs no-such-thing>=3 Run: pip install 'no-such-thing>=3'"


@pytest.mark.parametrize("asked", [False, True])
def test_broken_plugin(examine, site, monkeypatch, asked):
    install(site, "broken", "import no_such_module_here", version="4.2")
    if asked:
        monkeypatch.setenv("DOVETAIL_PLUGINS", "broken,models")
    code, found = examine()
    assert code == asked
    text = only(found["plugins"], "problem" if asked else "warning")
    assert "plugin 'broken' (dist-broken 4.2)" in text
    assert "no_such_module_here" in text


CHIP = """
from dovetail.contracts.platform import Probe

class Chip:
    @classmethod
    def probe(cls):
        {body}
"""
PLUGIN = """
from dovetail import hookimpl
from dovetail.plugins.manifest import PlatformManifest

@hookimpl
def dovetail_register_platforms(register):
    manifest = PlatformManifest(name="warp", summary="", device_type="warp", dtypes=("float32",), attention=())
    register(manifest, "fake_chip:Chip")
"""


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return Probe(available=False, reason='no driver; get it')", "is not available here: no driver; get it"),
        ("raise OSError('bus error')", "cannot be asked: OSError: bus error"),
        ("raise SystemExit(3)", "cannot be asked: SystemExit: 3"),
    ],
)
def test_platform_that_cannot_be_used(examine, site, body, expected):
    (site / "fake_chip.py").write_text(CHIP.format(body=body))
    install(site, "warp", PLUGIN)
    code, found = examine()
    assert code == 0, "nobody asked for it"
    others = [line for line in found["platforms"] if line["found"].startswith("warp ")]  # others may be lacking, too
    assert expected in only(others, "warning")
    code, found = examine("--platform", "warp")
    assert code == 1
    assert expected in only(found["platforms"], "problem")


# model files


def test_model_that_is_not_there(examine, tmp_path):
    code, found = examine(tmp_path / "nowhere" / "at" / "all")
    assert code == 1
    assert "There is no folder" in only(found["model"], "problem")
    assert found["options"] == []


def test_hub_model_that_was_not_downloaded(examine):
    code, found = examine("owner/never-downloaded")
    assert code == 0
    expected = "owner/never-downloaded is not on this machine yet `dovetail serve` downloads it."
    assert only(found["model"], "warning") == expected
    assert found["weights"] == found["memory"] == []


def test_config_that_cannot_be_read(examine, model):
    (model / "config.json").write_text("{")
    code, found = examine(model)
    assert code == 1
    assert "cannot be read as JSON" in only(found["model"], "problem")


def test_architecture_that_nobody_serves(examine, model):
    (model / "config.json").write_text(json.dumps({"architectures": ["ZebraForCausalLM"], "vocab_size": 8192}))
    code, found = examine(model)
    assert code == 1
    assert "is a ZebraForCausalLM, which no installed plugin serves" in only(found["model"], "problem")


def test_weights_cut_short(examine, model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    code, found = examine(model)
    assert code == 1
    assert "is truncated or corrupt" in only(found["weights"], "problem")


def test_weights_against_their_index(examine, model):
    index = {"weight_map": {"model.embed_tokens.weight": "model.safetensors", "lost.weight": "model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    code, found = examine(model)
    assert code == 1
    text = only(found["weights"], "problem")
    assert "1 tensors of model.safetensors.index.json are not in their files: lost.weight" in text
    index["weight_map"]["lost.weight"] = "model-00002.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002.safetensors is missing" in only(examine(model)[1]["weights"], "problem")


def test_no_weights(examine, model):
    (model / "model.safetensors").unlink()
    code, found = examine(model)
    assert code == 1
    assert "has neither model.safetensors nor" in only(found["weights"], "problem")
    assert texts(found["tokenizer"], "ok")


def test_no_weights_where_none_are_read(examine, model):
    words = ("--max-model-len", "64")
    (own,) = examine(model, *words)[1]["memory"]
    (model / "model.safetensors").unlink()
    code, found = examine(model, "--load-format", "dummy", *words)
    assert code == 0
    assert found["weights"] == []
    assert only(found["memory"], "ok").partition(" of KV")[0] == own["found"].partition(" of KV")[0]


def test_tokenizer_that_cannot_be_read(examine, model):
    (model / "tokenizer.json").write_text("{")
    code, found = examine(model)
    assert code == 1
    assert texts(found["tokenizer"], "problem")


def test_tokenizer_of_another_model(examine, model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    _, found = examine(model)
    assert "8192 tokens, and the model has 100" in only(found["tokenizer"], "problem")


def test_no_chat_template(examine, model):
    (model / "chat_template.jinja").unlink()
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    code, found = examine(model)
    assert code == 0
    assert "Give one with --chat-template." in only(found["tokenizer"], "warning")


# options, memory, port


def test_options_that_cannot_be_honoured(examine):
    code, found = examine("--attention", "cpu", "--block-size", "20", "--max-model-len", "9999")
    assert code == 1
    first, last = texts(found["options"], "problem")
    assert "has no 20-token blocks" in first
    assert "Nearest that works: --max-model-len 2048 --attention cpu (changed:" in last
    code, found = examine("--max-model-len", "9999", "--allow-fallback")
    assert code == 0
    assert "exceeds the 2048 positions" in only(found["options"], "warning")
    assert "2048 tokens per request" in only(found["options"], "ok")


def test_too_little_memory(examine, monkeypatch):
    monkeypatch.setattr(CpuPlatform, "memory", lambda self: MemoryInfo(total=1 << 20, available=1 << 20))
    code, found = examine()
    assert code == 1
    assert "1.0 MiB are available Lower --max-model-len" in only(found["memory"], "problem")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("0.0001", "less than a request needs Raise it"), ("100000", "asks for more Lower it")],
)
def test_cache_of_another_size(examine, asked, expected):
    code, found = examine("--kv-cache-memory", asked)
    assert code == 1
    assert expected in only(found["memory"], "problem")


class Answer(BaseHTTPRequestHandler):
    body = b"hello"

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"version": "4.2"}', "A Dovetail server 4.2 answers there."),
        (b"hello", "Something else than a Dovetail server answers there."),
    ],
)
def test_port_of_another_server(examine, body, expected):
    with HTTPServer(("127.0.0.1", 0), type("Other", (Answer,), {"body": body})) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        code, found = examine("--port", server.server_port)
        thread.join()
    assert code == 1
    text = only(found["port"], "problem")
    assert f"Cannot listen on 127.0.0.1:{server.server_port}: Address already in use." in text
    assert expected in text


@pytest.mark.parametrize("answer", [b"SSH-2.0-server\r\n", b"HTTP/1.0 404 Not Found\r\n\r\n"])
def test_port_of_something_else(examine, monkeypatch, answer):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        thread = threading.Thread(target=_answer_once, args=(taken, answer))
        thread.start()
        code, found = examine("--port", taken.getsockname()[1])
        thread.join()
    assert code == 1
    assert "Something else than a Dovetail server answers there." in only(found["port"], "problem")


def _answer_once(listener, answer):
    connection, _ = listener.accept()
    with connection:
        connection.recv(1 << 16)
        connection.sendall(answer)


def test_host_that_no_network_knows(examine):
    code, found = examine("--host", "a..b", "--port", "8123")
    assert code == 1
    assert "Cannot listen on a..b:8123: " in only(found["port"], "problem")


def test_port_of_something_silent(examine):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, found = examine("--port", taken.getsockname()[1])
    assert code == 1
    assert "Nobody answers there over HTTP." in only(found["port"], "problem")


def test_check_that_breaks_is_a_problem_of_its_own(examine, monkeypatch):
    monkeypatch.setattr(software, "unmet_by", lambda name: 1 / 0)
    code, found = examine()
    assert code == 1
    text = only(found["distributions"], "problem")
    assert text.startswith("cannot be checked: ZeroDivisionError: division by zero.")
    assert texts(found["port"], "ok")
