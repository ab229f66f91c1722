"""What the operator sees."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import fields

import pytest
from rich.console import Console

from dovetail.config import Change, Selection
from dovetail.contracts.executor import ExecutorInfo, KVGroup
from dovetail.engine import effective
from dovetail.engine.process import Ready
from dovetail.options import EngineOptions
from dovetail.server.console import print_configuration
from dovetail.server.service import ServedModel
from dovetail.testing import engine_config


@pytest.mark.parametrize("defaults", [{}, {"temperature": 0.5}])
def test_the_configuration_names_every_part_and_where_it_comes_from(defaults):
    stream = io.StringIO()
    config = engine_config(max_model_len=77)
    info = ExecutorInfo(num_blocks=11, block_size=4, groups=(KVGroup(layers=(0,)),))
    about = {"config": config, "info": info, "defaults": defaults, "asked": {"max_model_len": 77}}
    model = ServedModel(name="[odd]", tokenizer=None, **about)
    print_configuration(Console(file=stream, width=40), model, Ready(config, info, {"load": 1.234}), "http://h:1")
    text = stream.getvalue()
    assert "  attention     scripted (dovetail-core 0; for a test)\n" in text
    assert "  speculation   none\n" in text
    assert "40 tokens in 10 blocks of 4, 0.0 KiB; prefix cache on" in text
    assert "* limits        77 tokens per request" in text
    assert "* set by an option\n" in text
    assert "load 1.23 s" in text
    assert ("temperature 0.5 (generation_config.json)" in text) == bool(defaults)
    assert text.endswith("Serving [odd] at http://h:1\n")


def test_the_server_process_stays_light():
    code = "import sys, dovetail.server.main; print({'torch', 'transformers', 'numpy'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_every_part_setting_and_fallback_has_a_row():
    part = Selection(name="guess", target="", distribution="dist-g", version="2", why="asked for", plugin="g")
    change = Change(option="--dtype", asked="float16", got="float32", why=("reasons",))
    config = engine_config(
        spec_decoder=part,
        num_speculative_tokens=3,
        fallbacks=(change,),
        num_threads=2,
        enable_prefix_caching=False,
        eager=True,
        compile_cache="/somewhere",
    )
    info = ExecutorInfo(
        num_blocks=2**10, block_size=4, groups=(KVGroup(layers=(0,)),), page_bytes=2**20, draft_bytes=2**29
    )
    found = {row.title: row for row in effective.rows(config, info, {"dtype", "num_threads"})}
    assert found["speculation"].text == "guess (g, dist-g 2; asked for), up to 3 drafts per step"
    assert found["KV cache"].text == (
        "4092 tokens in 1023 blocks of 4, 1.50 GiB, 512.0 MiB of them the draft model's; prefix cache off"
    )
    assert found["platform"].text.endswith(", eager")
    assert found["compiled code"].text == "kept in /somewhere"
    assert found["fallback"] == ("fallback", "--dtype float16 → float32", True)
    assert [title for title, row in found.items() if row.changed] == ["dtype", "threads", "fallback"]
    assert effective.lines([effective.Row("a", "b")]) == ["  a  b"]


def test_every_option_of_the_engine_marks_a_row():
    """None can change what runs without showing; the tokenizer is beside it, and a fallback shows by itself."""
    info = ExecutorInfo(num_blocks=2, block_size=4, groups=())
    config = engine_config(num_threads=2, compile_cache="folder")
    unmarked = {
        f.name for f in fields(EngineOptions) if not any(row.changed for row in effective.rows(config, info, {f.name}))
    }
    assert unmarked == {"tokenizer", "allow_fallback"}
