"""What the operator sees."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from dovetail.contracts.executor import ExecutorInfo, KVGroup
from dovetail.engine.process import Ready
from dovetail.server.console import print_configuration
from dovetail.server.service import ServedModel
from dovetail.testing import engine_config


@pytest.mark.parametrize("defaults", [{}, {"temperature": 0.5}])
def test_the_configuration_names_every_part_and_where_it_comes_from(defaults):
    stream = io.StringIO()
    config = engine_config(max_model_len=77)
    info = ExecutorInfo(num_blocks=11, block_size=4, groups=(KVGroup(layers=(0,)),))
    model = ServedModel(name="[odd]", tokenizer=None, config=config, info=info, defaults=defaults)
    print_configuration(Console(file=stream, width=40), model, Ready(config, info, {"load": 1.234}), "http://h:1")
    text = stream.getvalue()
    assert "attention     scripted (dovetail-core 0; for a test)\n" in text
    assert "40 tokens in blocks of 4" in text
    assert "77 tokens per request" in text
    assert "load 1.23 s" in text
    assert ("temperature 0.5 (generation_config.json)" in text) == bool(defaults)
    assert text.endswith("Serving [odd] at http://h:1\n")


def test_the_server_process_stays_light():
    code = "import sys, dovetail.server.main; print({'torch', 'transformers', 'numpy'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
