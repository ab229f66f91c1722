"""Our own executors, in the public form: the one that computes, and the scripted one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from dovetail.config import EngineConfig
from dovetail.contracts.executor import KVGroup
from dovetail.runner.executor import LocalExecutor
from dovetail.sampling_params import SamplingParams
from dovetail.testing import ScriptedExecutor, ScriptedModel, engine_config
from dovetail.testing.conformance import ExecutorManifest, ExecutorSuite, unregistered
from dovetail.testing.conformance.small_engine import ATTENTION, core_part

VOCAB_SIZE = 128


class TestLocal(ExecutorSuite):
    subject = unregistered(
        LocalExecutor,
        ExecutorManifest(
            name="local",
            summary="One process, one device.",
            checkpoint=True,
            logit_rules=True,
            filters=True,
            logprobs=True,
            prompt_logprobs=True,
            drafts=True,
        ),
    )


class TestWhole(TestLocal):
    """On a platform that compiles sampling with the model."""

    def config(self, folder: Path, *, drafts: int = 0, windowed: bool = True) -> EngineConfig:
        config = super().config(folder, drafts=drafts, windowed=windowed)
        platform = core_part("dovetail.testing.platforms:WholePlatform")
        return msgspec.structs.replace(config, platform=platform, attention=ATTENTION)


class TwoGroups(ScriptedExecutor):
    """With a window, and with drafts when the configuration asks for them."""

    def __init__(self, config: EngineConfig) -> None:
        groups = (KVGroup(layers=(0,), window=24), KVGroup(layers=(1,)))
        drafts = config.num_speculative_tokens
        super().__init__(config, groups=groups, num_drafts=drafts, draft_accuracy=0.7)


class TestScripted(ExecutorSuite):
    subject = unregistered(TwoGroups, ExecutorManifest(name="scripted", summary="Answers by a script.", drafts=True))

    def config(self, folder: Path, *, drafts: int = 0, windowed: bool = True) -> EngineConfig:
        return engine_config(
            vocab_size=VOCAB_SIZE,
            block_size=16,
            max_model_len=128,
            max_num_seqs=4,
            num_speculative_tokens=drafts,
        )

    def next_token(
        self,
        tokens: Sequence[int],
        prompt_len: int,
        params: SamplingParams,
        seed: int,
        eos_token_ids: Sequence[int],
        *,
        windowed: bool = True,
    ) -> int:
        return ScriptedModel(VOCAB_SIZE).next_token(tokens, prompt_len, params, eos_token_ids, seed)
