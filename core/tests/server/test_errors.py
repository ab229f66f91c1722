"""Every refusal: status, shape, and the field at fault. The server goes on afterwards."""

from __future__ import annotations

import json
import socket

import pytest

from dovetail.errors import RequestError
from dovetail.server import protocol
from dovetail.server.protocol import ChatBody, CompletionBody, DetokenizeBody

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]


def error_of(response, status):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.fixture(autouse=True)
def _still_serving(server):
    yield
    assert server.complete("k", max_tokens=1)["choices"][0]["text"] == "l"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [260]}, "prompt"),
        ({"prompt": [10**40]}, "prompt"),
        ({"prompt": "", "add_special_tokens": False}, "prompt"),
        ({"prompt": "a", "model": 5}, "model"),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 10**30}, "max_tokens"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "temperature": -0.1}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "top_p": 1.1}, "top_p"),
        ({"prompt": "a", "top_k": -2}, "top_k"),
        ({"prompt": "a", "top_k": 10**30}, "top_k"),
        ({"prompt": "a", "min_p": 2}, "min_p"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": 10**9}, "n"),
        ({"prompt": "a", "n": 10**30}, "n"),
        ({"prompt": "a", "seed": 2**70}, "seed"),
        ({"prompt": "a", "seed": 0.5}, "seed"),
        ({"prompt": "a", "presence_penalty": 3}, "presence_penalty"),
        ({"prompt": "a", "frequency_penalty": -3}, "frequency_penalty"),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
        ({"prompt": "a", "min_tokens": 20, "max_tokens": 10}, "min_tokens"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "logprobs": 10**30}, "logprobs"),
        ({"prompt": "a", "logprobs": 21, "echo": True}, "logprobs"),
        ({"prompt": "a", "prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt": "a", "stop": [5]}, "stop[0]"),
        ({"prompt": "a", "stop": 5}, "stop"),
        ({"prompt": "a", "stop": ""}, "stop"),
        ({"prompt": "a", "stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"prompt": "a", "stop_token_ids": [10**30]}, "stop_token_ids[0]"),
        ({"prompt": "a", "allowed_token_ids": []}, "allowed_token_ids"),
        ({"prompt": "a", "allowed_token_ids": [999]}, "allowed_token_ids"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"5": "1"}}, "logit_bias.5"),
        ({"prompt": "a", "logit_bias": {"9" * 50: 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": [1]}, "logit_bias"),
        ({"prompt": "a", "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"prompt": "a", "priority": 10**30}, "priority"),
        ({"prompt": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "use_beam_search": True}, "use_beam_search"),
        ({"prompt": "a", "prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"prompt": "a", "bad_words": ["x"]}, "bad_words"),
        ({"prompt": "a", "guided_json": {"type": "object"}}, "guided_json"),
        ({"prompt": "a", "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"prompt": "a", "response_format": {"type": "json_object"}}, "response_format"),
        ({"prompt": "a", "response_format": "json"}, "response_format"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_completions_refuse_with_the_field(server, body, param, stream):
    error = error_of(server.post(COMPLETIONS, stream=stream, **body), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert param.partition("[")[0].partition(".")[0] in error["message"]


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"max_tokens": "5"}, 'max_tokens is "5"; it must be a valid integer.'),
        ({"max_tokens": True}, "max_tokens is true; it must be a valid integer."),
        ({"max_tokens": 2**63}, "max_tokens is 9223372036854775808; it must be less than 9223372036854775808."),
        ({"n": "y" * 10**4}, f'n is "{"y" * 39}…; it must be a valid integer.'),
        ({"stop": 5}, "stop is 5; it must be a valid string or a valid array."),
        ({"stop": ["a", 5]}, "stop[1] is 5; it must be a valid string."),
        ({"stop": ["a"] * 129}, "stop has 129 strings; at most 128 are looked for, so send fewer."),
        ({"logit_bias": [1]}, "logit_bias is a list; it must be an object."),
        ({"logit_bias": {"5": {}}}, "logit_bias.5 is an object; it must be a valid number."),
        ({"prompt": 5}, "prompt is 5; send a text"),
        ({"prompt": {}}, "prompt is an object; send a text"),
        ({"prompt": ["a", 5]}, "prompt[1] is 5; send a text"),
        ({"prompt": [0.5]}, "prompt[0] is 0.5; send a text"),
        ({"prompt": [[1], "a"]}, 'prompt[1] is "a"; send a text'),
        ({"prompt": [[1], ["a"]]}, "prompt is a list of lists that hold more than token ids; send a text"),
    ],
)
def test_refusals_name_the_value(server, field, said):
    error = error_of(server.post(COMPLETIONS, **{"prompt": "a", **field}), 400)
    assert error["message"].startswith(said)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (CompletionBody, "stop"),
        (CompletionBody, "stop_token_ids"),
        (CompletionBody, "allowed_token_ids"),
        (ChatBody, "messages"),
        (ChatBody, "tools"),
        (ChatBody, "documents"),
        (DetokenizeBody, "tokens"),
    ],
)
def test_one_wrong_item_is_described_of_however_many(body, field):
    """Each takes microseconds, during which nobody else is served."""
    described = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "_request_error", lambda errors: described.extend(errors) or RequestError("wrong"))
        with pytest.raises(RequestError):
            body.from_json(json.dumps({"messages": [], field: [None] * 1000}).encode())
    assert 0 < len(described) <= 2


def test_as_many_stop_strings_as_are_looked_for_are_accepted(server):
    assert server.complete("a", max_tokens=1, stop=["never"] * 128)["choices"][0]["text"] == "b"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": USER, "max_completion_tokens": 0}, "max_completion_tokens"),
        ({"messages": USER, "max_tokens": 0}, "max_tokens"),
        ({"messages": USER, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": USER, "logprobs": 3}, "logprobs"),
        ({"messages": USER, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"messages": USER, "tool_choice": "required"}, "tool_choice"),
        ({"messages": USER, "response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"messages": USER, "functions": [{"name": "f"}]}, "functions"),
        ({"messages": USER, "chat_template": "{{ 1 }}"}, "chat_template"),
        ({"messages": USER, "audio": {"voice": "x"}}, "audio"),
        ({"messages": USER, "chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs"),
        ({"messages": [{"role": "assistant", "content": "hi", "tool_calls": 5}]}, "messages"),
        ({"messages": USER, "min_tokens": 4000}, "min_tokens"),
        ({"messages": USER, "min_tokens": 2**63 - 1}, "min_tokens"),
        ({"messages": USER, "continue_final_message": True, "add_generation_prompt": 1}, "add_generation_prompt"),
    ],
)
def test_chat_refuses_with_the_field(server, body, param):
    assert error_of(server.post(CHAT, **body), 400)["param"] == param


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [260]}, "tokens"),
    ],
)
def test_tokenizing_refuses_with_the_field(server, path, body, param):
    assert error_of(server.post(path, **body), 400)["param"] == param


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"nonsense", b'{"prompt": "a",}', b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 100_000],
)
def test_malformed_json(server, content):
    for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
        assert "JSON" in error_of(server.http.post(path, content=content), 400)["message"]


@pytest.mark.parametrize("content", [b"[]", b'"text"', b"5", b"null"])
def test_json_that_is_no_object(server, content):
    assert "object" in error_of(server.http.post(COMPLETIONS, content=content), 400)["message"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(server, value):
    content = f'{{"prompt": "a", "temperature": {value}}}'.encode()
    assert error_of(server.http.post(COMPLETIONS, content=content), 400)["param"] == "temperature"
    content = f'{{"prompt": "a", "logit_bias": {{"5": {value}}}}}'.encode()
    assert error_of(server.http.post(COMPLETIONS, content=content), 400)["param"] == "logit_bias.5"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_unknown_models(server, path):
    body = {"model": "gone", "prompt": "a", "messages": USER, "tokens": [1]}
    if path == "/tokenize":
        del body["messages"]
    error = error_of(server.post(path, **body), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "`gone`" in error["message"]
    assert "`fake`" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_beyond_the_context(server, stream):
    for path, body in (
        (COMPLETIONS, {"prompt": "a" * 4000}),
        (COMPLETIONS, {"prompt": ["a", "b" * 5000]}),
        (COMPLETIONS, {"prompt": [5] * 3990, "max_tokens": 11}),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 4000}]}),
        (CHAT, {"messages": USER, "max_completion_tokens": 4000}),
    ):
        error = error_of(server.post(path, **body, stream=stream), 400)
        assert error["code"] == "context_length_exceeded"
        assert "This model's maximum context length is 4000 tokens" in error["message"]
    assert server.complete([5] * 3990, max_tokens=10)["usage"]["total_tokens"] <= 4000


def test_what_exceeds_the_cache_is_refused_before_the_stream_begins(start):
    own = start(config={"executor": {"num_blocks": 11}})
    for stream in (False, True):
        error = error_of(own.post(COMPLETIONS, prompt="a", max_tokens=1000, stream=stream), 400)
        assert error["param"] == "max_tokens"
        assert "KV blocks" in error["message"]
    assert own.complete("k", max_tokens=1)


def test_more_prompts_than_may_ever_wait(start):
    own = start(max_waiting=4)
    assert own.post(COMPLETIONS, prompt=["k"] * 20, max_tokens=1).status_code == 200
    assert own.post(COMPLETIONS, prompt="k", max_tokens=1, n=21).status_code == 200
    for fields in ({"prompt": ["k"] * 21}, {"prompt": ["k"] * 3, "n": 7}):
        error = error_of(own.post(COMPLETIONS, **fields, max_tokens=1), 400)
        assert error["param"] == "prompt"
        assert "20 requests" in error["message"]


def test_bodies_over_the_limit(server):
    body = json.dumps({"prompt": "a" * 600_000}).encode()
    assert error_of(server.http.post(COMPLETIONS, content=body), 413)["code"] == "request_too_large"
    chunked = (b"x" * 100_000 for _ in range(8))
    assert error_of(server.http.post(CHAT, content=chunked), 413)["message"].count("0.5 MB") == 1


def test_bodies_far_over_the_limit_are_cut_off(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n")
        answer = b""
        try:
            for _ in range(200):
                connection.sendall(b"x" * 50_000)
        except OSError:
            pass
        while chunk := _receive(connection):
            answer += chunk
    assert not answer or answer.startswith(b"HTTP/1.1 413")


def _receive(connection):
    try:
        return connection.recv(65536)
    except OSError:
        return b""


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_token_is_the_servers(server, stream):
    messages = [{"role": "user", "content": "~"}, {"role": "assistant", "content": "c"}]
    for path, body in (
        (COMPLETIONS, {"prompt": "~c", "temperature": 0}),
        (CHAT, {"messages": messages, "continue_final_message": True}),
    ):
        error = error_of(server.post(path, **body, stream=stream), 500)
        assert (error["type"], error["code"]) == ("server_error", "generation_failed")
        assert error["message"] == "Its logits are not finite."


def test_a_failure_in_the_middle_of_a_stream_is_its_last_event(server):
    failed = server.metric("dovetail:request_success_total", '{finished_reason="error"}')
    body = {"prompt": "~.", "temperature": 0, "stream": True}
    with server.http.stream("POST", COMPLETIONS, json=body) as response:
        *chunks, last = [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line]
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "b", "c"]
    assert last["error"]["code"] == "generation_failed"
    assert server.metric("dovetail:request_success_total", '{finished_reason="error"}') == failed + 1
    error_of(server.post(COMPLETIONS, **{**body, "stream": False}), 500)


def test_a_client_that_leaves_in_the_middle_of_its_body(server):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")


def test_unknown_routes_and_methods(server):
    assert "/nowhere" in error_of(server.http.get("/nowhere"), 404)["message"]
    response = server.http.get(COMPLETIONS)
    assert "GET" in error_of(response, 405)["message"]
    assert response.headers["allow"] == "POST"
    error_of(server.http.get("/v1/models/gone"), 404)


def test_request_ids_are_echoed_if_they_are_sane(server):
    response = server.http.post(COMPLETIONS, json={"prompt": "k"}, headers={"X-Request-Id": "my-id/1"})
    assert response.headers["x-request-id"] == "my-id/1"
    assert response.json()["id"] == "cmpl-my-id/1"
    for bad in ("a b", "x" * 200):
        response = server.http.get("/health", headers={"X-Request-Id": bad})
        assert len(response.headers["x-request-id"]) == 32
    error = server.http.post(COMPLETIONS, json={}, headers={"X-Request-Id": "my-id"})
    assert error.headers["x-request-id"] == "my-id"


def test_equal_request_ids_do_not_clash(server):
    headers = {"X-Request-Id": "same"}
    body = {"prompt": "k", "max_tokens": 30, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", COMPLETIONS, json=body, headers=headers) as first:
        assert server.http.post(COMPLETIONS, json={"prompt": "k"}, headers=headers).status_code == 200
        assert first.read().endswith(b"data: [DONE]\n\n")
