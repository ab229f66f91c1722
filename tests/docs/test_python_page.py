"""The blocks of the page on Python run in order, and its tables name what there is."""

import re
from dataclasses import fields
from inspect import signature

import msgspec
import torch

from dovetail import LLM, CompletionOutput, RequestOutput, SamplingParams


def test_blocks(read_page, capsys):
    threads = torch.get_num_threads()
    names = {}
    for number, block in enumerate(read_page("docs/python.md").blocks("python")):
        exec(compile(block, f"python.md, block {number}", "exec"), names)
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "llama on cpu in" in printed
    assert "temperature is -1; it must be in [0.0, 100.0]." in printed
    assert "Did you mean max_model_len?" in printed


def rows(text, title):
    table = text.partition(title)[2].partition("|---|")[2].partition("\n\n")[0]
    cells = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`(\w+)", cell)]


def test_tables(read_page):
    text = read_page("docs/python.md").text
    assert rows(text, "## Sampling parameters") == list(SamplingParams.__struct_fields__)
    assert set(rows(text, "`RequestOutput`:")) == {field.name for field in fields(RequestOutput)}
    assert set(rows(text, "`CompletionOutput`:")) == {field.name for field in fields(CompletionOutput)}
    public = {name for name in vars(LLM) if not name.startswith("_")}
    assert set(rows(text, "## LLM")) == public


def test_defaults(read_page):
    text = read_page("docs/python.md").text.partition("## Sampling parameters")[2]
    defaults = {field.name: field.default for field in msgspec.structs.fields(SamplingParams)}
    for names, value in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (\S+) \|", text, re.MULTILINE):
        for name in re.findall(r"\w+", names):
            if name in defaults:
                assert repr(defaults[name]) == value, name


def test_signatures(read_page):
    text = read_page("docs/python.md").text
    for name in ("generate", "chat", "stream"):
        (given,) = re.findall(rf"^\| `{name}\((.*?)\)` \|", text, re.MULTILINE)
        expected = []
        for parameter in list(signature(getattr(LLM, name)).parameters.values())[1:]:
            if parameter.kind is parameter.KEYWORD_ONLY and "*" not in expected:
                expected.append("*")
            default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
            expected.append(f"{parameter.name}{default}")
        assert given.split(", ") == expected
