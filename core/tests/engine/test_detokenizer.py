"""Incremental detokenization: joined parts equal the whole, and nothing that was returned ever changes."""

from __future__ import annotations

import time

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from dovetail.engine.detokenizer import ByteDetokenizer, WindowDetokenizer
from dovetail.engine.pieces import read_pieces
from dovetail.engine.tokenizer import Tokenizer

BYTE_KINDS = ("byte_level", "byte_fallback", "metaspace", "demo")
texts = st.text(st.characters(codec="utf-8"), max_size=40)


def stream(tokenizer: Tokenizer, ids: list[int], sizes: list[int], skip: bool = True) -> list[str]:
    """Push ids in chunks of the given sizes, over and over."""
    detokenizer = tokenizer.detokenizer(skip)
    parts, position, turn = [], 0, 0
    while position < len(ids):
        size = sizes[turn % len(sizes)]
        parts.append(detokenizer.push(ids[position : position + size]))
        position, turn = position + size, turn + 1
    return [*parts, detokenizer.flush()]


def kind(loaded: dict[str, Tokenizer], name: str) -> Tokenizer:
    if name not in loaded:
        pytest.skip("the demo checkpoint is not beside this package")
    return loaded[name]


@pytest.mark.parametrize("name", BYTE_KINDS)
def test_byte_tables_are_used_where_the_decoder_allows(loaded, name):
    assert isinstance(kind(loaded, name).detokenizer(), ByteDetokenizer)


def test_other_decoders_use_the_window(loaded):
    assert isinstance(loaded["wordpiece"].detokenizer(), WindowDetokenizer)


@pytest.mark.parametrize("name", BYTE_KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_text_survives_any_split(loaded, name, data):
    tokenizer = kind(loaded, name)
    ids = tokenizer.encode(data.draw(texts))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    skip = data.draw(st.booleans())
    assert "".join(stream(tokenizer, ids, sizes, skip)) == tokenizer.backend.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", BYTE_KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_tokens_equal_the_library(loaded, name, data):
    tokenizer = kind(loaded, name)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    skip = data.draw(st.booleans())
    whole = tokenizer.decode(ids, skip)
    assert "".join(stream(tokenizer, ids, sizes, skip)) == whole
    if name != "byte_fallback":
        assert whole == tokenizer.backend.decode(ids, skip_special_tokens=skip)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_byte_fallback_equals_the_library_unless_a_run_mixes_valid_and_invalid_bytes(loaded, data):
    tokenizer = loaded["byte_fallback"]
    words = st.integers(259, tokenizer.vocab_size - 1).map(lambda i: [i])
    valid = texts.map(lambda text: [3 + byte for byte in text.encode()])
    invalid = st.lists(st.integers(0x80, 0xBF).map(lambda byte: 3 + byte), max_size=3)
    runs = data.draw(st.lists(st.tuples(words, valid | invalid), max_size=6))
    ids = [token for word, run in runs for token in [*word, *run]]
    assert "".join(stream(tokenizer, ids, [1])) == tokenizer.backend.decode(ids)


def test_a_byte_run_keeps_its_complete_characters(loaded):
    tokenizer = loaded["byte_fallback"]
    ids = [3 + byte for byte in "é".encode() + b"\xf0\x9f"]
    assert tokenizer.decode(ids) == "é\ufffd\ufffd"
    assert tokenizer.backend.decode(ids) == "\ufffd" * 4


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_a_split_character_waits_for_its_last_byte(loaded, name):
    tokenizer = loaded[name]
    ids = [token for token in tokenizer.encode("🙂", add_special_tokens=False) if tokenizer.token_text(token) != " "]
    assert len(ids) > 1
    parts = stream(tokenizer, ids, [1])
    assert [part for part in parts if part] == ["🙂"]
    assert parts[len(ids) - 1] == "🙂", "it comes with the token that completes it"


def test_an_unfinished_character_becomes_a_replacement_at_the_end(loaded):
    tokenizer = loaded["byte_level"]
    ids = tokenizer.encode("x🙃", add_special_tokens=False)[:-1]
    assert stream(tokenizer, ids, [1])[-1] == "\ufffd"


@pytest.mark.parametrize("name", ["byte_fallback", "metaspace"])
def test_only_the_first_space_is_dropped(loaded, name):
    tokenizer = loaded[name]
    ids = tokenizer.encode("the wolf")
    assert stream(tokenizer, ids, [1])[:2] == ["", "the"]
    assert tokenizer.decode(ids) == "the wolf"
    assert tokenizer.decode(ids[-1:]).strip() == tokenizer.decode(ids[-1:])


def test_special_tokens_are_kept_on_demand(loaded):
    tokenizer = loaded["byte_level"]
    ids = tokenizer.encode("a</s><tool>b")
    assert "".join(stream(tokenizer, ids, [1])) == "a<tool>b"
    assert "".join(stream(tokenizer, ids, [1], skip=False)) == "<s>a</s><tool>b"


def test_ids_without_a_token_give_no_text(loaded):
    for tokenizer in loaded.values():
        assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_window_equals_whole(loaded, data):
    tokenizer = loaded["wordpiece"]
    ids = tokenizer.encode(data.draw(st.text("abc xyz the wolf!?", max_size=40)))
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    assert "".join(stream(tokenizer, ids, sizes)) == tokenizer.backend.decode(ids)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_window_holds_split_characters(loaded, data):
    backend = loaded["byte_level"].backend
    ids = loaded["byte_level"].encode(data.draw(texts.filter(lambda text: "\ufffd" not in text)))
    detokenizer = WindowDetokenizer(lambda ids: backend.decode(list(ids)))
    parts = [detokenizer.push([token]) for token in ids]
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) + detokenizer.flush() == backend.decode(ids)


def test_window_stays_short(loaded):
    calls: list[int] = []

    def decode(ids):
        calls.append(len(ids))
        return loaded["wordpiece"].backend.decode(list(ids))

    detokenizer = WindowDetokenizer(decode)
    ids = loaded["wordpiece"].encode("the wolf said what big eyes " * 20)
    assert detokenizer.push(ids) + detokenizer.flush() == loaded["wordpiece"].backend.decode(ids)
    assert max(calls) <= 3


@pytest.mark.parametrize(
    ("decoder", "known"),
    [
        (None, False),
        (decoders.BPEDecoder(), False),
        (decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]), True),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]), True),
        (decoders.Sequence([decoders.ByteFallback(), decoders.Replace("▁", " ")]), False),
        (decoders.Sequence([decoders.Replace(tokenizers.Regex("▁"), " "), decoders.Fuse()]), False),
        (decoders.Sequence([decoders.Fuse(), decoders.Strip("x", 1, 0)]), False),
        (decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]), False),
        (decoders.Sequence([decoders.ByteFallback(), decoders.Strip(" ", 1, 0)]), False),
    ],
)
def test_only_understood_decoders_become_tables(loaded, decoder, known):
    backend = tokenizers.Tokenizer.from_str(loaded["byte_fallback"].backend.to_str())
    if decoder is None:
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    else:
        backend.decoder = decoder
    assert (read_pieces(backend) is not None) is known


def test_one_token_costs_microseconds(loaded):
    tokenizer = loaded["byte_level"]
    ids = tokenizer.encode("the wolf said 🙂 " * 500)
    tokenizer.decode(ids)  # fills the table
    detokenizer = tokenizer.detokenizer()
    start = time.perf_counter()
    for token in ids:
        detokenizer.push([token])
    per_token = (time.perf_counter() - start) / len(ids)
    assert per_token < 50e-6  # about 1 µs on an idle core
