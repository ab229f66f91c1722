"""Log-probabilities as clients get them."""

from __future__ import annotations

import json
import math

import msgspec
import pytest
from tokenizers import Tokenizer as Backend

from dovetail.engine.outputs import Logprob
from dovetail.engine.tokenizer import Tokenizer
from dovetail.server.logprobs import LogprobsWriter

A, B, E1, E2 = 4 + ord("a"), 4 + ord("b"), 4 + 0xC3, 4 + 0xA9


@pytest.fixture
def tokenizer(tmp_path):
    from tokenizers import decoders, models, pre_tokenizers

    vocab = {chr(256 + i): i for i in range(4)} | {c: 300 + i for i, c in enumerate("ab")}
    backend = Backend(models.BPE({**vocab, "Ã": E1, "©": E2, "a": A, "b": B}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


@pytest.fixture
def writer(tokenizer):
    return LogprobsWriter(tokenizer, as_token_ids=False)


def strict(value):
    """As a client's JSON parser sees it."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(msgspec.json.encode(value), parse_constant=refuse)


def test_minus_infinity_becomes_a_number(writer):
    position = {A: Logprob(-math.inf, 9, "a"), B: Logprob(-0.5, 1, "b")}
    completion = strict(writer.completion([A], [position], 0))
    assert completion["token_logprobs"] == [-9999.0]
    assert completion["top_logprobs"] == [{"a": -9999.0, "b": -0.5}]
    chat = strict(writer.chat([A], [position], 1))
    assert chat["content"][0]["logprob"] == -9999.0
    assert strict(writer.prompt([None, position]))[1][str(A)]["logprob"] == -9999.0
    assert strict(writer.chat([A], [{A: Logprob(math.nan, 1, "a")}], 0))["content"][0]["logprob"] == -9999.0


def test_the_chosen_token_is_on_top_only_if_it_is_likely(writer):
    position = {A: Logprob(-3.0, 7, "a"), B: Logprob(-0.1, 1, "b")}
    (entry,) = strict(writer.chat([A], [position], 1))["content"]
    assert entry["token"] == "a"
    assert [top["token"] for top in entry["top_logprobs"]] == ["b"]
    (entry,) = strict(writer.chat([A], [position], 2))["content"]
    assert [top["token"] for top in entry["top_logprobs"]] == ["b", "a"]


def test_tokens_with_equal_text_do_not_hide_the_chosen_one(writer):
    position = {E1: Logprob(-0.5, 2, "\ufffd"), E2: Logprob(-0.2, 1, "\ufffd")}
    columns = writer.completion([E1], [position], 3)
    assert columns.token_logprobs == [-0.5]
    assert columns.top_logprobs == [{"\ufffd": -0.5}]
    assert columns.text_offset == [3]


def test_halves_of_characters_have_bytes(writer):
    first, second = strict(writer.chat([E1, E2], [{E1: Logprob(-1, 1, "\ufffd")}, {E2: Logprob(-1, 1, "\ufffd")}], 0))[
        "content"
    ]
    assert bytes(first["bytes"] + second["bytes"]).decode() == "é"


def test_no_prompt_logprobs(writer):
    assert writer.prompt(None) is None
