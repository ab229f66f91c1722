"""POST /v1/chat/completions."""

from __future__ import annotations

import openai
import pytest

USER = {"role": "user", "content": "say."}
CHAT = "/v1/chat/completions"


def test_an_answer(server):
    response = server.chat("say.", max_tokens=3)
    assert response["object"] == "chat.completion"
    assert response["id"].startswith("chatcmpl-")
    (choice,) = response["choices"]
    assert choice["message"] == {"role": "assistant", "content": "abc", "refusal": None}
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert response["usage"]["prompt_tokens"] == len("user: say.\nassistant:")


def test_without_a_limit_it_ends_by_itself(server):
    (choice,) = server.chat()["choices"]
    assert choice["message"]["content"] == "abcdefghijklmnopqrstuvwxyz"
    assert choice["finish_reason"] == "stop"


def test_the_newer_name_of_the_limit_wins(server):
    assert server.chat(max_completion_tokens=2)["usage"]["completion_tokens"] == 2
    assert server.chat(max_completion_tokens=2, max_tokens=9)["usage"]["completion_tokens"] == 2


def test_n_answers_at_temperature_zero(server):
    choices = server.chat(n=2, max_tokens=2)["choices"]
    assert [choice["message"]["content"] for choice in choices] == ["ab", "ab"]


def test_parts_roles_and_template_arguments(server):
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "3", "tool_call_id": "x"},
        USER,
    ]
    body = {
        "messages": messages,
        "max_tokens": 1,
        "return_token_ids": True,
        "chat_template_kwargs": {"mood": "gay"},
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "none",
    }
    response = server.post(CHAT, **body)
    assert response.status_code == 200, response.text
    prompt = server.post("/detokenize", tokens=response.json()["prompt_token_ids"]).json()["prompt"]
    assert "system: s\n" in prompt
    assert "one\ntwo" in prompt
    assert prompt.endswith("user: say.\n[1 tools][gay]assistant:")


def test_developers_are_the_system_to_templates_that_do_not_know_them(server):
    messages = [{"role": "developer", "content": "d"}, USER]
    tokens = server.post("/tokenize", messages=messages).json()["tokens"]
    assert server.post("/detokenize", tokens=tokens).json()["prompt"].startswith("system: d\n")


def test_continuing_the_last_message(server):
    messages = [USER, {"role": "assistant", "content": "abc"}]
    body = {"messages": messages, "max_tokens": 2, "temperature": 0, "continue_final_message": True}
    assert server.post(CHAT, **body).json()["choices"][0]["message"]["content"] == "de"
    assert server.post(CHAT, **body, echo=True).json()["choices"][0]["message"]["content"] == "abcde"
    first, _ = server.events(CHAT, **body, echo=True)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "abcd"}


def test_logprobs(server):
    (choice,) = server.chat("#", logprobs=True, top_logprobs=1, max_tokens=2)["choices"]
    first = choice["logprobs"]["content"][0]
    assert (first["token"], first["bytes"], first["logprob"]) == ("a", [97], 0.0)
    assert first["top_logprobs"] == [{"token": "a", "bytes": [97], "logprob": 0.0}]
    assert choice["logprobs"]["refusal"] is None
    (choice,) = server.chat(logprobs=True, max_tokens=1)["choices"]
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []


def test_prompt_logprobs(server):
    entries = server.chat(prompt_logprobs=0, max_tokens=1)["prompt_logprobs"]
    assert entries[0] is None
    assert len(entries) == len("user: say.\nassistant:")


def test_streams(server):
    events = server.events(CHAT, messages=[USER], max_tokens=4, stream_options={"include_usage": True})
    *chunks, last = events
    assert {chunk["object"] for chunk in events} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in events}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": "a"}
    assert deltas[1:] == [{"content": "b"}, {"content": "c"}, {"content": "d"}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "length"]
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 4)
    assert {chunk["usage"] for chunk in chunks} == {None}


def test_streams_of_several_answers_have_a_role_each(server):
    events = server.events(CHAT, messages=[USER], n=3, max_tokens=2, logprobs=True, return_token_ids=True)
    roles = [event["choices"][0]["index"] for event in events if "role" in event["choices"][0]["delta"]]
    ends = [event["choices"][0]["index"] for event in events if event["choices"][0]["finish_reason"]]
    assert sorted(roles) == sorted(ends) == [0, 1, 2]
    assert ["prompt_token_ids" in event for event in events] == [True] + [False] * 5
    assert all(len(event["choices"][0]["logprobs"]["content"]) == 1 for event in events)
    assert all(len(event["choices"][0]["token_ids"]) == 1 for event in events)


def test_continuous_usage(server):
    options = {"continuous_usage_stats": True}
    events = server.events(CHAT, messages=[USER], max_tokens=3, stream_options=options)
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3]


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_the_openai_client_chats(client):
    answer = client.chat.completions.create(
        model="fake", messages=[USER], max_completion_tokens=4, temperature=0, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].message.content == "abcd"
    assert answer.choices[0].logprobs.content[0].token == "a"
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0


def test_the_openai_client_streams(client):
    with client.chat.completions.stream(
        model="fake", messages=[USER], stop=["fg"], temperature=0, stream_options={"include_usage": True}
    ) as stream:
        list(stream)
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "abcde"
    assert final.choices[0].finish_reason == "stop"
    assert final.usage.completion_tokens == 7


def test_the_openai_client_completes_and_lists(client):
    answer = client.completions.create(
        model="fake", prompt=["k", "p"], max_tokens=2, temperature=0, extra_body={"ignore_eos": True, "top_k": 1}
    )
    assert [choice.text for choice in answer.choices] == ["lm", "qr"]
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").max_model_len == 4000


def test_the_openai_client_gets_typed_errors(client):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gone", messages=[USER])
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fake", messages=[USER], max_tokens=10**6)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "max_tokens"
