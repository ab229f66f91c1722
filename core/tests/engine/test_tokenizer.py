"""The tokenizer against transformers, and the files that it reads."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dovetail.engine.tokenizer import Tokenizer
from dovetail.errors import ConfigError, RequestError

KINDS = ("byte_level", "byte_fallback", "metaspace", "wordpiece")
TEXTS = [
    "",
    "Once upon a time",
    " two  spaces\n\tand tabs ",
    "日本語 🙂 naïve привет",
    "<s>a</s><|user|> b<tool>c",
    "héllo wörld!",
]


def change(folder, to, **config):
    """A copy of a folder with other entries in tokenizer_config.json; None removes one."""
    to.mkdir()
    (to / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    values = json.loads((folder / "tokenizer_config.json").read_text()) | config
    values = {key: value for key, value in values.items() if value is not None}
    (to / "tokenizer_config.json").write_text(json.dumps(values))
    return to


def assert_equal(folder, texts=TEXTS):
    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(str(folder))
    for text in texts:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == ids
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)
    assert ours.special_ids >= set(theirs.all_special_ids)
    return ours


@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(folders, kind):
    assert_equal(folders[kind])


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@settings(max_examples=80, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_equals_transformers(folders, kind, text):
    theirs = _THEIRS.setdefault(kind, AutoTokenizer.from_pretrained(str(folders[kind])))
    ours = _OURS.setdefault(kind, Tokenizer.from_folder(folders[kind]))
    assert ours.encode(text) == theirs.encode(text)


_THEIRS: dict = {}
_OURS: dict = {}


def test_the_demo_equals_transformers(demo_folder):
    assert_equal(demo_folder)


@pytest.mark.parametrize("flags", [(True, False), (False, False), (True, True), (False, True)])
@pytest.mark.parametrize("kind", ["byte_level", "wordpiece"])
def test_the_post_processor_of_tokenizer_json_rules(folders, tmp_path, kind, flags):
    """``wordpiece`` has none, so even ``add_bos_token`` adds nothing."""
    bos, eos = flags
    folder = change(folders[kind], tmp_path / "changed", add_bos_token=bos, add_eos_token=eos)
    tokenizer = assert_equal(folder)
    assert tokenizer.encode("wolf")[:1] == [1] if kind == "byte_level" else tokenizer.encode("wolf")[0] != 1


def test_tokens_that_only_the_config_lists_are_added(folders, tmp_path):
    backend = Tokenizer.from_folder(folders["byte_level"]).backend
    added, size = backend.get_added_tokens_decoder(), backend.get_vocab_size()
    listed = {str(i): {"content": token.content, "special": token.special} for i, token in added.items()}
    listed[str(size)] = {"content": "<new>", "special": False}
    listed[str(size + 1)] = {"content": "<ctl>", "special": True}
    folder = change(
        folders["byte_level"], tmp_path / "changed", added_tokens_decoder=listed, extra_special_tokens=["<extra>"]
    )
    tokenizer = assert_equal(folder, ["a<new>b", "a<ctl>b", "<extra>"])
    assert tokenizer.decode(tokenizer.encode("a<new><ctl><extra>")) == "a<new>"


@pytest.mark.parametrize("form", ["text", "object"])
def test_special_tokens_may_come_from_their_own_file(folders, tmp_path, form):
    folder = change(folders["byte_level"], tmp_path / "changed", bos_token=None, eos_token=None, unk_token=None)
    named = {"bos_token": "<s>", "eos_token": "<|user|>"}
    if form == "object":
        named = {key: {"content": value, "lstrip": False} for key, value in named.items()}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    tokenizer = assert_equal(folder)
    assert tokenizer.eos_token_id == tokenizer.token_to_id("<|user|>")


def test_truncation_and_padding_of_the_file_are_ignored(folders, tmp_path):
    folder = change(folders["byte_level"], tmp_path / "changed")
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=16, pad_token="<unk>")
    backend.save(str(folder / "tokenizer.json"))
    assert_equal(folder, ["one two three four five", "x"])


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_token_bytes_make_up_the_text(loaded, kind):
    tokenizer = loaded[kind]
    ids = tokenizer.encode("the 🙂", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode().strip() == "the 🙂"
    assert tokenizer.token_text(ids[-1]) == "\ufffd"
    assert tokenizer.token_text(tokenizer.eos_token_id) == "</s>"


def test_token_bytes_without_a_table(loaded):
    tokenizer = loaded["wordpiece"]
    assert tokenizer.token_bytes(tokenizer.encode("the")[0]) == b"the"


def test_ids_and_tokens(tokenizer):
    assert tokenizer.id_to_token(1) == "<s>"
    assert tokenizer.id_to_token(10_000) is None
    assert tokenizer.token_to_id("nowhere") is None
    assert tokenizer.is_special(1)
    assert not tokenizer.is_special(tokenizer.token_to_id("<tool>"))
    assert Tokenizer(tokenizer.backend).bos_token_id is None


def test_templates_come_from_any_of_their_places(folders, tmp_path):
    messages = [{"role": "user", "content": "hi"}]

    def render(folder, **kwargs):
        return Tokenizer.from_folder(folder, **kwargs).apply_chat_template(messages)

    def tools(folder):
        return Tokenizer.from_folder(folder).apply_chat_template(messages, tools=[{"name": "f"}])

    listed = [{"name": "default", "template": "list"}, {"name": "tool_use", "template": "tools"}]
    folder = change(folders["byte_level"], tmp_path / "a", chat_template=listed)
    assert (render(folder), tools(folder)) == ("list", "tools")
    (folder / "chat_template.json").write_text('{"chat_template": "json"}')
    assert (render(folder), tools(folder)) == ("json", "json")
    (folder / "chat_template.jinja").write_text("jinja")
    assert render(folder) == "jinja"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("more")
    assert (render(folder), tools(folder)) == ("jinja", "more")
    (tmp_path / "own").write_text("{{ messages[0]['content'] }}!")
    assert render(folder, chat_template=str(tmp_path / "own")) == "hi!"
    assert render(folder, chat_template="{{ messages[0]['role'] }}") == "user"


def test_without_a_template_chat_is_refused(folders, tmp_path):
    tokenizer = Tokenizer.from_folder(change(folders["byte_level"], tmp_path / "a", chat_template=None))
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="--chat-template") as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert caught.value.param == "messages"


def test_an_older_format_is_converted_by_transformers(folders, tmp_path):
    backend = Tokenizer.from_folder(folders["byte_level"]).backend
    state = json.loads(backend.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(state["vocab"]))
    merges = [" ".join(merge) for merge in state["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    text = "the wolf 🙂"
    assert tokenizer.encode(text) == AutoTokenizer.from_pretrained(str(tmp_path)).encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_an_older_format_without_transformers_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'dovetail-core\[transformers\]'"):
        Tokenizer.from_folder(tmp_path)


def test_what_cannot_be_read_is_named(folders, tmp_path):
    with pytest.raises(ConfigError, match="no folder"):
        Tokenizer.from_folder(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"no tokenizer.json, and transformers finds no"):
        Tokenizer.from_folder(tmp_path)
    folder = change(folders["byte_level"], tmp_path / "a")
    with pytest.raises(ConfigError, match="chat template nowhere cannot be read"):
        Tokenizer.from_folder(folder, chat_template="nowhere")
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"tokenizer_config.json must hold a JSON object"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config.json is not valid JSON"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer.json cannot be read"):
        Tokenizer.from_folder(folder)


def test_the_front_end_stays_light():
    code = (
        "import sys, dovetail.engine.processor, dovetail.engine.llm\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
