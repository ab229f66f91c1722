"""An engine without a model, for a real engine process: it continues the alphabet.

After a letter comes the next one, after "z" the end of sequence; after anything else "a", or with a seed the
seed's own letter; after "#" an "é" in two tokens. The token ``<crash>`` at the end of a prompt kills the engine.
After "abc", a prompt with "~" fails like one whose logits are no numbers.
``config.json`` holds fields of EngineConfig, and under ``executor`` arguments of FailingExecutor.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec

from dovetail import checkpoint
from dovetail.engine.engine import Engine
from dovetail.errors import ConfigError, ModelLoadError
from dovetail.testing import ScriptedExecutor, ScriptedModel, engine_config

CRASH, EOS, FIRST_BYTE = 0, 2, 4
VOCAB_SIZE = FIRST_BYTE + 256
FAILURE = FIRST_BYTE + 255


class FailingExecutor(ScriptedExecutor):
    """Reports an error for the request whose next token is ``FAILURE``; closing it leaves a file, or fails too."""

    def __init__(self, config, *, closes=True, **arguments):
        super().__init__(config, **arguments)
        self._closes = closes

    def run(self, plan):
        result = super().run(plan)
        errors = {i: "Its logits are not finite." for i, new in enumerate(result.token_ids) if FAILURE in new}
        new = [[] if i in errors else tokens for i, tokens in enumerate(result.token_ids)]
        return msgspec.structs.replace(result, token_ids=new, errors=errors)

    def close(self):
        (Path(self.config.model_path) / "closed").touch()
        if not self._closes:
            raise RuntimeError("it cannot be closed")


def next_token(token_ids, seed):
    last = token_ids[-1] - FIRST_BYTE
    if token_ids[-1] == CRASH:
        raise RuntimeError("the prompt ends with <crash>")
    if last == ord("c") and FIRST_BYTE + ord("~") in token_ids:
        return FAILURE
    if ord("a") <= last < ord("z"):
        return FIRST_BYTE + last + 1
    if last == ord("z"):
        return EOS
    if last == ord("#"):
        return FIRST_BYTE + 0xC3
    if last == 0xC3:
        return FIRST_BYTE + 0xA9
    return FIRST_BYTE + ord("a") + seed % 5


def build(options, registries, progress):
    """The factory."""
    path = checkpoint.locate(options.model)
    fields = checkpoint.read_config(path)
    arguments = fields.pop("executor", {})
    if "refuse" in fields:
        raise ConfigError(fields["refuse"])
    if "misfit" in fields:
        raise ModelLoadError(fields["misfit"])
    if "vanish" in fields:
        os._exit(fields["vanish"])
    time.sleep(fields.pop("load_seconds", 0))
    config = engine_config(
        model_path=str(path),
        model_name=options.model,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=(EOS,),
        **{"max_model_len": 4000, "max_num_seqs": 16, "max_num_batched_tokens": 512, "block_size": 16, **fields},
    )
    executor = FailingExecutor(config, model=ScriptedModel(VOCAB_SIZE, next_token), **{"delay": 0.002, **arguments})
    info = executor.load(progress)
    progress.update("warm-up", 1, 1)
    return Engine(config, executor, info), config, info
