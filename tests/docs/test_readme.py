"""The first page: its plugin works, its examples run."""

import shlex

import httpx
import torch

from dovetail import checkpoint
from dovetail.options import EngineOptions
from dovetail.plugins.registry import Registries

SMALL = ["--num-threads", "1", "--max-model-len", "256", "--max-num-seqs", "4", "--max-num-batched-tokens", "64"]


def test_plugin(installed):
    page = installed("README.md")
    (command,) = page.page.dovetail("generate")
    greedy = [*SMALL, "--temperature", "0", "--max-tokens", "24"]
    plain = shlex.split(f"generate --prompt {shlex.quote(command[-1])}")
    assert page.dovetail(*command, *greedy) == page.dovetail(*plain, *greedy)


def test_client(read_page, server, capsys):
    client, _ = read_page("README.md").blocks("python")
    exec(compile(client.replace("http://127.0.0.1:8000", server.url), "README.md", "exec"), {})
    assert len(capsys.readouterr().out) > 40


def test_offline(read_page, capsys):
    _, offline = read_page("README.md").blocks("python")
    threads = torch.get_num_threads()
    exec(compile(offline, "README.md", "exec"), {})
    torch.set_num_threads(threads)
    assert len(capsys.readouterr().out) > 40


def test_demo_is_what_it_says(server):
    (card,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert card["id"] == "fable-4m"


def test_folders_are_served_by_a_name(read_page, tmp_path):
    page = read_page("README.md")
    (command,) = [words for words in page.dovetail("serve") if "path/to/checkpoint" in words]
    name = command[command.index("--served-model-name") + 1]
    assert f"as `{name}` here; without `--served-model-name`, by the path" in page.text
    (tmp_path / "config.json").write_text("{}")
    assert checkpoint.select(EngineOptions(model=str(tmp_path)), Registries()) == (tmp_path, str(tmp_path))


def test_place_for_figures(read_page):
    text = read_page("README.md").text
    assert text.index("<!-- benchmarks -->") < text.index("<!-- /benchmarks -->")
