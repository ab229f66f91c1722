"""The estimate against what loading takes: the least KV cache with which the executor starts."""

from __future__ import annotations

import msgspec
import pytest

from dovetail.contracts.executor import Progress
from dovetail.errors import ConfigError
from dovetail.runner.estimate import needed
from dovetail.runner.executor import LocalExecutor
from dovetail.testing.conformance import tiny
from dovetail.testing.conformance.small_engine import core_part, model_config

MODEL = core_part("dovetail.testing.conformance.tiny:TinyModel")
ORACLE = core_part("dovetail.testing.conformance.oracle_decoder:OracleDecoder")


def config_of(folder, hf_config, **changes):
    folder.mkdir()
    tiny.write_checkpoint(folder, hf_config)
    return model_config(MODEL, hf_config, folder, tiny.TinyModel.facts(hf_config), **changes)


@pytest.mark.parametrize("hf_config", [tiny.CONFIG, tiny.WINDOWED], ids=["full", "windowed"])
@pytest.mark.parametrize("drafts", [False, True], ids=["alone", "draft"])
def test_one_request_takes_what_is_said(tmp_path, hf_config, drafts):
    config = config_of(tmp_path / "model", hf_config)
    if drafts:
        draft = config_of(tmp_path / "draft", tiny.CONFIG, num_speculative_tokens=4)
        config = msgspec.structs.replace(config, draft=draft, spec_decoder=ORACLE, num_speculative_tokens=4)
    need = needed(config, tmp_path / "model")

    def load(num_bytes):
        executor = LocalExecutor(msgspec.structs.replace(config, kv_cache_memory=num_bytes))
        return executor.load(Progress())

    with pytest.raises(ConfigError, match="One request of --max-model-len"):
        load(need.one_request)
    info = load(int(need.one_request * 1.1))  # and the null block
    assert info.page_bytes < need.one_request * 0.1
    stored = sum(weight.numel() * 4 for weight in tiny.weights(hf_config).values())
    assert need.weights == (1 + drafts) * stored
