"""The examples of the API's page run against a server, and it answers as the page says."""

import json
import re
import subprocess

import httpx
import pytest

from dovetail import __version__

BASE = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def page(read_page):
    return read_page("docs/api.md")


def test_curl(page, server):
    commands = page.blocks("bash")
    assert len(commands) >= 3
    for command in commands:
        done = subprocess.run(
            ["bash", "-euc", command.replace(BASE, server.url)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        if "-sN" in command:
            events = done.stdout.split("\n\n")
            assert events[-2:] == ["data: [DONE]", ""]
            assert json.loads(events[-3].removeprefix("data: "))["usage"]["completion_tokens"] <= 16
            assert not json.loads(events[-3].removeprefix("data: "))["choices"]
        else:
            decoder, rest = json.JSONDecoder(), done.stdout
            while rest:
                answer, end = decoder.raw_decode(rest)
                assert "error" not in answer, answer
                rest = rest[end:]


@pytest.mark.parametrize("number", range(3))
def test_python(page, server, number, capsys):
    block = page.blocks("python")[number]
    exec(compile(block.replace(BASE, server.url), "api.md", "exec"), {})
    assert len(capsys.readouterr().out) > 20


def test_every_example_is_run(page):
    assert len(page.blocks("python")) == 3


def test_error_example(page, server):
    (example,) = page.blocks("json")
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "temperature": -1})
    assert answer.status_code == 400
    assert answer.json() == json.loads(example)


def test_probes(server):
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "plugins": []}
    assert httpx.get(f"{server.url}/version").json() == {"version": __version__}
    answer = httpx.get(f"{server.url}/version", headers={"x-request-id": "mine"})
    assert answer.headers["x-request-id"] == "mine"


def test_additions(server):
    body = {"prompt": "Once upon a time " * 8, "max_tokens": 2, "return_token_ids": True, "seed": 1}
    for _ in range(2):
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    (choice,) = answer["choices"]
    assert len(choice["token_ids"]) <= 2
    assert choice["prompt_token_ids"]
    assert "stop_reason" in choice
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_every_field_is_accepted(page, server):
    """With a value of the type that its description gives."""
    values = {
        "n": 2, "max_tokens": 3, "min_tokens": 1, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1,
        "presence_penalty": 0.1, "frequency_penalty": 0.1, "repetition_penalty": 1.1, "seed": 3, "stop": ["x"],
        "stop_token_ids": [2], "include_stop_str_in_output": True, "ignore_eos": True, "logit_bias": {"5": 1},
        "allowed_token_ids": [5, 6, 7], "prompt_logprobs": 1, "skip_special_tokens": False, "priority": 1,
        "cache_salt": "s", "truncate_prompt_tokens": 4, "return_token_ids": True, "return_tokens_as_token_ids": True,
        "stream": False, "stream_options": None,
    }  # fmt: skip
    section = page.text.partition("## Fields of both")[2].partition("### Refused")[0]
    named = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) - {"model"}
    assert named == set(values)
    for path, body in (
        ("completions", {"prompt": "Once upon a time", "logprobs": 1, "echo": True, "best_of": 2}),
        ("chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 1}),
    ):
        answer = httpx.post(f"{server.url}/v1/{path}", json=body | values, timeout=60)
        assert answer.status_code == 200, answer.text
