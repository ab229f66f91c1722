"""The routes that do not generate."""

from __future__ import annotations

import dovetail


def test_health_ping_and_version(server):
    assert server.http.get("/health").json() == {"status": "ok", "plugins": []}
    assert server.http.get("/ping").status_code == 200
    assert server.http.post("/ping").status_code == 200
    assert server.http.get("/version").json() == {"version": dovetail.__version__}


def test_models(server):
    listed = server.http.get("/v1/models").json()
    assert listed["object"] == "list"
    (card,) = listed["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("fake", "model", 4000)
    assert server.http.get("/v1/models/fake").json() == card


def test_the_effective_configuration_is_served(server):
    served = server.http.get("/v1/config").json()
    assert set(served) == {"asked", "engine", "executor", "sampling_defaults", "plugins"}
    assert served["asked"]["max_body_mb"] == 0.5
    assert served["engine"]["max_num_seqs"] == 16
    assert served["engine"]["attention"]["why"] == "for a test"
    assert served["engine"]["fallbacks"] == []
    (builtin,) = [plugin for plugin in served["plugins"] if plugin["name"] == "builtin"]
    assert (builtin["state"], builtin["traceback"]) == ("loaded", None)
    assert served["executor"]["block_size"] == 16
    assert served["sampling_defaults"] == {"temperature": 0.8, "top_p": 0.95}
    assert "temperature 0.8, top_p 0.95" in server.log


def test_the_api_key_is_never_told(start):
    locked = start(api_key="open-sesame")
    headers = {"Authorization": "Bearer open-sesame"}
    text = locked.http.get("/v1/config", headers=headers).text
    assert "port" in text
    assert "open-sesame" not in text
    assert locked.http.get("/config", headers=headers).status_code == 404


def test_tokenize_a_text(server):
    answer = server.post("/tokenize", prompt="ab", return_token_strs=True).json()
    assert answer == {"count": 3, "max_model_len": 4000, "tokens": [1, 101, 102], "token_strs": ["<s>", "a", "b"]}
    plain = server.post("/tokenize", model="fake", prompt="ab", add_special_tokens=False).json()
    assert plain["tokens"] == [101, 102]
    assert plain["token_strs"] is None


def test_tokenize_messages_as_chat_does(server):
    messages = [{"role": "user", "content": "hi"}]
    answer = server.post("/tokenize", messages=messages).json()
    assert server.post("/detokenize", tokens=answer["tokens"]).json() == {"prompt": "user: hi\nassistant:"}
    assert server.chat("hi", max_tokens=1)["usage"]["prompt_tokens"] == answer["count"]


def test_long_texts_are_tokenized_beside_other_requests(server):
    answer = server.post("/tokenize", prompt="ab" * 25_000).json()
    assert answer["count"] == 50_001
    assert server.post("/detokenize", tokens=answer["tokens"][1:]).json()["prompt"] == "ab" * 25_000


def test_detokenize_nothing(server):
    assert server.post("/detokenize", tokens=[]).json() == {"prompt": ""}
