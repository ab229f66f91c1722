"""POST /v1/completions."""

from __future__ import annotations

import pytest

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def token(character):
    return 4 + ord(character)


def test_a_text_is_completed(server):
    response = server.complete("say.", max_tokens=5)
    assert response["object"] == "text_completion"
    assert response["model"] == "fake"
    assert response["id"].startswith("cmpl-")
    (choice,) = response["choices"]
    assert choice == {
        "index": 0,
        "text": "abcde",
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }
    usage = response["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (5, 5, 10)


def test_the_end_of_sequence_stops_and_counts_but_is_not_shown(server):
    response = server.complete("say w", max_tokens=50)
    (choice,) = response["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("xyz", "stop", None)
    assert response["usage"]["completion_tokens"] == 4


def test_ignore_eos_goes_on(server):
    (choice,) = server.complete("say x", max_tokens=5, ignore_eos=True, skip_special_tokens=False)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("yz</s>ab", "length")


def test_min_tokens_masks_the_end(server):
    (choice,) = server.complete("say y", max_tokens=4, min_tokens=3)["choices"]
    assert len(choice["text"]) >= 2
    assert choice["finish_reason"] == "length"


def test_the_default_is_sixteen_tokens(server):
    assert server.complete()["usage"]["completion_tokens"] == 16
    assert server.complete(max_tokens=None)["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("k", ["lm"]),
        (["k", "p"], ["lm", "qr"]),
        ([token("k")], ["lm"]),
        ([[token("k")], [token("p"), token("s")]], ["lm", "tu"]),
    ],
)
def test_the_four_forms_of_prompts(server, prompt, texts):
    choices = server.complete(prompt, max_tokens=2)["choices"]
    assert [choice["text"] for choice in choices] == texts
    assert [choice["index"] for choice in choices] == list(range(len(texts)))


def test_n_completions_per_prompt_come_prompt_by_prompt(server):
    response = server.complete([[token("a")], [token("m"), token("m")]], n=2, max_tokens=2)
    assert [choice["text"] for choice in response["choices"]] == ["bc", "bc", "no", "no"]
    assert [choice["index"] for choice in response["choices"]] == [0, 1, 2, 3]
    assert response["usage"]["prompt_tokens"] == 3
    assert response["usage"]["completion_tokens"] == 8


def test_seeds_count_up_over_n(server):
    response = server.complete("say.", n=3, seed=1, temperature=1, max_tokens=1)
    assert [choice["text"] for choice in response["choices"]] == ["b", "c", "d"]


def test_stop_strings_cross_token_borders_and_are_cut(server):
    (choice,) = server.complete("say.", stop=["zzz", "def"], max_tokens=20)["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("abc", "stop", "def")
    (choice,) = server.complete("say.", stop="cd", include_stop_str_in_output=True, max_tokens=20)["choices"]
    assert choice["text"] == "abcd"


def test_stop_token_ids(server):
    (choice,) = server.complete("say.", stop_token_ids=[token("d")], max_tokens=20)["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("abc", "stop", token("d"))


def test_characters_of_several_tokens_come_whole(server):
    assert server.complete("#", max_tokens=4)["choices"][0]["text"] == "éab"
    texts = [event["choices"][0]["text"] for event in server.events("/v1/completions", prompt="#", max_tokens=4)]
    assert texts == ["", "é", "a", "b"]


def test_echo_returns_the_prompt_first(server):
    assert server.complete("say.", echo=True, max_tokens=2)["choices"][0]["text"] == "say.ab"
    ids = [token("x"), token("k")]
    assert server.complete(ids, echo=True, max_tokens=2)["choices"][0]["text"] == "xklm"


def test_logprobs_have_one_entry_per_token(server):
    logprobs = server.complete("say.", logprobs=1, max_tokens=3)["choices"][0]["logprobs"]
    assert logprobs == {
        "text_offset": [0, 1, 2],
        "token_logprobs": [0.0, 0.0, 0.0],
        "tokens": ["a", "b", "c"],
        "top_logprobs": [{"a": 0.0}, {"b": 0.0}, {"c": 0.0}],
    }


def test_loglikelihood_requests_of_evaluation_harnesses(server):
    """Scores prompt tokens: the chosen one is among the top ones with the very same number, the first is null."""
    context, continuation = [token(c) for c in "the "], [token(c) for c in "abc"]
    body = {"prompt": [context + continuation], "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    (choice,) = server.complete(**body)["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == list("the abcd")
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    scored = slice(len(context), -1)
    assert logprobs["tokens"][scored] == list("abc")
    for chosen, value, top in zip(
        logprobs["tokens"][scored], logprobs["token_logprobs"][scored], logprobs["top_logprobs"][scored], strict=True
    ):
        assert top[chosen] == value == max(top.values())


def test_token_ids_on_demand(server):
    choice = server.complete("k", return_token_ids=True, max_tokens=2)["choices"][0]
    assert choice["prompt_token_ids"] == [1, token("k")]
    assert choice["token_ids"] == [token("l"), token("m")]


def test_tokens_as_token_ids(server):
    body = {"logprobs": 1, "return_tokens_as_token_ids": True, "max_tokens": 1}
    logprobs = server.complete("k", **body)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{token('l')}"]
    assert logprobs["top_logprobs"] == [{f"token_id:{token('l')}": 0.0}]


def test_prompt_logprobs_by_token_id(server):
    entries = server.complete("kl", prompt_logprobs=0, max_tokens=1)["choices"][0]["prompt_logprobs"]
    assert entries[0] is None
    assert entries[2] == {str(token("l")): {"logprob": 0.0, "rank": 1, "decoded_token": "l"}}


def test_special_tokens_and_truncation_of_the_prompt(server):
    plain = server.complete("abc", add_special_tokens=False, max_tokens=1)
    assert plain["usage"]["prompt_tokens"] == 3
    cut = server.complete("abck", truncate_prompt_tokens=1, echo=True, max_tokens=1)
    assert cut["usage"]["prompt_tokens"] == 1
    assert cut["choices"][0]["text"] == "kl"
    long = server.complete("k" * 5000, truncate_prompt_tokens=-1, max_tokens=10)
    assert long["usage"]["prompt_tokens"] == 3990


def test_the_prefix_cache_shows_in_usage(server):
    prompt = "a long enough prompt that nobody else sends, "
    details = [server.complete(prompt, max_tokens=1)["usage"]["prompt_tokens_details"] for _ in range(2)]
    assert details == [{"cached_tokens": 0}, {"cached_tokens": 32}]
    assert server.complete(prompt, max_tokens=1, cache_salt="x")["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_nulls_mean_not_given_and_strangers_are_ignored(server):
    names = (
        "model", "n", "max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty",
        "frequency_penalty", "repetition_penalty", "seed", "stop", "stop_token_ids", "logit_bias",
        "logprobs", "echo", "best_of", "suffix", "user", "stream", "stream_options", "ignore_eos",
        "priority", "response_format", "guided_json", "structured_outputs",
    )
    nulls = dict.fromkeys(names)
    response = server.post("/v1/completions", prompt="k", **nulls)
    assert response.status_code == 200, response.text
    extras = {"user": "me", "store": True, "metadata": {"a": 1}, "service_tier": "auto", "never_heard_of": [1]}
    assert server.complete("k", max_tokens=1, best_of=1, stop=[], response_format={"type": "text"}, **extras)


def test_streams_say_the_same_as_whole_answers(server):
    for body in (
        {"prompt": ["k", "#"], "n": 2, "max_tokens": 6},
        {"prompt": "say.", "stop": "fgh", "max_tokens": 20},
        {"prompt": "say.", "echo": True, "logprobs": 1, "max_tokens": 3},
        {"prompt": "say w", "max_tokens": 20},
    ):
        whole = server.complete(**body)
        texts, reasons, tokens = {}, {}, {}
        events = server.events("/v1/completions", **body)
        assert len({event["id"] for event in events}) == 1
        for event in events:
            assert "usage" not in event
            (choice,) = event["choices"]
            index = choice["index"]
            texts[index] = texts.get(index, "") + choice["text"]
            tokens.setdefault(index, []).extend((choice["logprobs"] or {}).get("tokens", []))
            assert index not in reasons
            if choice["finish_reason"] is not None:
                reasons[index] = choice["finish_reason"]
        assert [texts[i] for i in sorted(texts)] == [choice["text"] for choice in whole["choices"]]
        assert [reasons[i] for i in sorted(texts)] == [choice["finish_reason"] for choice in whole["choices"]]
        logprobs = whole["choices"][0]["logprobs"]
        assert tokens[0] == (logprobs["tokens"] if logprobs else [])


def test_offsets_go_on_over_chunks(server):
    events = server.events("/v1/completions", prompt="say.", logprobs=0, max_tokens=3)
    assert [event["choices"][0]["logprobs"]["text_offset"] for event in events] == [[0], [1], [2]]


def test_one_chunk_per_token(server):
    events = server.events("/v1/completions", prompt="say.", max_tokens=10)
    assert [event["choices"][0]["text"] for event in events] == list(ALPHABET[:10])


def test_usage_of_streams(server):
    options = {"include_usage": True}
    *chunks, last = server.events("/v1/completions", prompt="say.", max_tokens=3, stream_options=options)
    assert [chunk["usage"] for chunk in chunks] == [None] * 3
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = server.events("/v1/completions", prompt="say.", max_tokens=3, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3]
    assert last["usage"]["total_tokens"] == 8
