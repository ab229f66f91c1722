"""LocalExecutor: one process, one device."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from dovetail.config import EngineConfig
from dovetail.contracts.executor import Executor, ExecutorInfo, Progress
from dovetail.contracts.platform import Platform
from dovetail.contracts.specdec import SpecConfig, SpecDecoder
from dovetail.errors import PluginLoadError, PluginRunError
from dovetail.messages import StepPlan, StepResult
from dovetail.plugins.blame import blaming
from dovetail.runner import kv_memory, rehearsal, self_check
from dovetail.runner.checked_decoder import CheckedDecoder
from dovetail.runner.draft_memory import bytes_beside_block, draft_blocks, draft_bytes
from dovetail.runner.draft_model import DraftRunner
from dovetail.runner.forward import ForwardPass
from dovetail.runner.load import load_selection, platform_config
from dovetail.runner.loaded_model import LoadedModel
from dovetail.runner.proposer import Proposer
from dovetail.runner.runner import ModelRunner
from dovetail.runner.slots import SlotTables
from dovetail.runner.stepped import Stepper
from dovetail.runner.steppers import with_sampling


class LocalExecutor(Executor):
    """Loads a resolved configuration into this process and runs its steps."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._platform: Platform | None = None
        self._runner: ModelRunner | None = None
        self._passes: list[Stepper | ForwardPass] = []

    def load(self, progress: Progress) -> ExecutorInfo:
        """Build platform, model, cache and runner; then warm up the shape policy's ladder."""
        try:
            with blaming(self._config, "loading", PluginLoadError):
                return self._load(progress)
        except BaseException as error:
            try:
                self.close()
            except Exception as second:  # noqa: BLE001  (what went wrong first says more)
                error.add_note(f"Then, closing failed: {second!r}")
            raise

    def _load(self, progress: Progress) -> ExecutorInfo:
        config = self._config
        start = time.perf_counter()
        platform: Platform = load_selection(config.platform)(platform_config(config))
        self._platform = platform
        ops = self_check.checked_ops(config.platform, platform, getattr(torch, config.dtype))
        shapes = platform.shape_policy(config.max_num_batched_tokens, config.max_num_seqs)
        main = LoadedModel.load(config, platform, ops, progress)
        drafter = None if config.draft is None else LoadedModel.load(config.draft, platform, ops, progress)
        groups = kv_memory.groups_of(main.facts.attention)
        tables = SlotTables(config.max_num_seqs, config.max_model_len, config.block_size, len(groups), platform)
        sampling = with_sampling(config, platform, ops, shapes)

        def passes(blocks: int) -> tuple[Stepper, DraftRunner | None]:
            """Over caches of that many blocks of the engine's own."""
            self._forget_passes()
            forward = main.forward_pass(groups, blocks, tables, shapes, 1 + config.num_speculative_tokens)
            stepper = sampling(forward)
            self._passes = [stepper]
            if drafter is None:
                return stepper, None
            draft = DraftRunner(drafter, shapes, tables, draft_blocks(drafter, groups, blocks))
            self._passes.append(draft.forward)
            return stepper, draft

        def bytes_per_block() -> int:
            """With the draft model's share."""
            return main.block_bytes(groups) + (0 if drafter is None else bytes_beside_block(drafter, groups))

        memory = platform.memory()
        is_counted = memory.peak is not None
        trial_blocks = (
            kv_memory.trial_blocks(config, bytes_per_block(), groups, memory) if is_counted and shapes.whole else 1
        )
        trial = passes(trial_blocks) if is_counted else None
        if trial is not None:
            platform.prepare(partial(rehearsal.pad_largest_step, config, *trial))
        for loaded in filter(None, (main, drafter)):
            loaded.check_attention(shapes)
        if trial is not None:
            rehearsal.run_largest_step(config, *trial, groups)
            memory = kv_memory.without(platform.memory(), (trial_blocks - 1) * bytes_per_block())
        blocks = kv_memory.num_blocks(config, bytes_per_block(), groups, memory)
        if trial_blocks != blocks:
            trial = None  # one cache at a time
        stepper, draft = trial or passes(blocks)
        self._runner = ModelRunner(stepper, self._proposer(tables, draft))
        ready = time.perf_counter()
        rehearsal.warm_up(stepper, draft, ops, progress)
        platform.await_compiled(lambda done, total: progress.update("warm-up", done, total))
        platform.warmed_up()
        return ExecutorInfo(
            num_blocks=blocks,
            block_size=config.block_size,
            groups=groups,
            page_bytes=main.block_bytes(groups),
            draft_bytes=0 if drafter is None else draft_bytes(drafter, groups, blocks),
            load_seconds=ready - start,
            warm_up_seconds=time.perf_counter() - ready,
        )

    def run(self, plan: StepPlan) -> StepResult:
        """Run one step."""
        return self.submit(plan)()

    def submit(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Queue one step on the device."""
        assert self._runner is not None, "run before load"
        with blaming(self._config, "running a step", PluginRunError):
            read = self._runner.submit(plan)

        def result() -> StepResult:
            with blaming(self._config, "running a step", PluginRunError):
                return read()

        return result

    def close(self) -> None:
        """Drop model and cache."""
        self._runner = None
        try:
            self._forget_passes()
        finally:
            if self._platform is not None:
                self._platform.close()

    def _forget_passes(self) -> None:
        for each in self._passes:
            each.close()
        self._passes = []

    def _proposer(self, tables: SlotTables, draft: DraftRunner | None) -> Proposer | None:
        config = self._config
        if config.spec_decoder is None:
            return None
        spec_config = SpecConfig(
            num_speculative_tokens=config.num_speculative_tokens,
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            vocab_size=config.vocab_size,
            options=config.spec_options,
            draft=draft,
        )
        decoder: SpecDecoder = load_selection(config.spec_decoder)(spec_config, tables.tokens_SL.device)
        checked = CheckedDecoder(decoder, config.spec_decoder, spec_config)
        return Proposer(checked, draft, tables, config.num_speculative_tokens)
