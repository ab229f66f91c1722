"""LocalExecutor: one process, one device."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from dovetail.config import EngineConfig
from dovetail.contracts.attention import AttentionBackend
from dovetail.contracts.executor import Executor, ExecutorInfo, Progress
from dovetail.contracts.model import Model, ModelContext, ModelFacts
from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import Platform, PlatformConfig
from dovetail.contracts.specdec import SpecConfig, SpecDecoder
from dovetail.kv.groups import group_layers
from dovetail.messages import StepPlan, StepResult
from dovetail.runner import kv_memory
from dovetail.runner.load import load_selection
from dovetail.runner.loader import load_weights
from dovetail.runner.runner import ModelRunner
from dovetail.runner.sampler import Sampler
from dovetail.runner.slots import SlotTables


class LocalExecutor(Executor):
    """Loads a resolved configuration into this process and runs its steps."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._runner: ModelRunner | None = None

    def load(self, progress: Progress) -> ExecutorInfo:
        """Build platform, model, cache and runner; then warm up the shape policy's ladder."""
        config = self._config
        start = time.perf_counter()
        platform: Platform = load_selection(config.platform)(PlatformConfig(num_threads=config.num_threads))
        dtype: torch.dtype = getattr(torch, config.dtype)
        ops = OpTable.resolve(platform.ops(dtype), owner=f"platform {config.platform.name}")
        facts, model = self._load_model(platform, ops, dtype, progress)
        backend: AttentionBackend = load_selection(config.attention)(
            ops=ops,
            device=platform.device,
            dtype=dtype,
            kv_dtype=getattr(torch, config.kv_dtype),
            block_size=config.block_size,
        )
        groups = group_layers([(spec.window, spec.num_kv_heads, spec.head_size) for spec in facts.attention])
        bytes_per_block = kv_memory.block_bytes(facts.attention, groups, backend)
        blocks = kv_memory.num_blocks(config, bytes_per_block, groups, platform.memory().available)
        shapes = platform.shape_policy(config.max_num_batched_tokens, config.max_num_seqs)
        self._runner = ModelRunner(
            platform=platform,
            model=model,
            backend=backend,
            specs=facts.attention,
            groups=groups,
            caches=kv_memory.allocate(facts.attention, groups, backend, blocks),
            tables=SlotTables(
                config.max_num_seqs, config.max_model_len, config.block_size, len(groups), platform.device
            ),
            sampler=Sampler(config.max_num_seqs, config.vocab_size, platform.device, ops),
            shapes=shapes,
            spec_decoder=self._spec_decoder(platform.device),
            num_speculative_tokens=config.num_speculative_tokens,
            vocab_size=config.vocab_size,
        )
        loaded = time.perf_counter()
        ladder = shapes.ladder()
        for done, bucket in enumerate(ladder):
            progress.update("warm-up", done, len(ladder))
            self._runner.warm_up(bucket)
        progress.update("warm-up", len(ladder), len(ladder))
        return ExecutorInfo(
            num_blocks=blocks,
            block_size=config.block_size,
            groups=groups,
            page_bytes=bytes_per_block,
            load_seconds=loaded - start,
            warm_up_seconds=time.perf_counter() - loaded,
        )

    def run(self, plan: StepPlan) -> StepResult:
        """Run one step."""
        assert self._runner is not None, "run before load"
        return self._runner.run(plan)

    def close(self) -> None:
        """Drop model and cache."""
        self._runner = None

    def _load_model(
        self, platform: Platform, ops: OpTable, dtype: torch.dtype, progress: Progress
    ) -> tuple[ModelFacts, Model]:
        config = self._config
        model_class: type[Model] = load_selection(config.model)
        quant_class = load_selection(config.quant)
        context = ModelContext(
            ops=ops,
            dtype=dtype,
            device=platform.device,
            quant=quant_class(config.hf_config.get("quantization_config")),
            max_model_len=config.max_model_len,
        )
        with torch.inference_mode():
            model = model_class(config.hf_config, context)
            load_weights(model, Path(config.model_path), progress)
        return model_class.facts(config.hf_config), model

    def _spec_decoder(self, device: torch.device) -> SpecDecoder | None:
        config = self._config
        if config.spec_decoder is None:
            return None
        spec_config = SpecConfig(
            num_speculative_tokens=config.num_speculative_tokens,
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            vocab_size=config.vocab_size,
            options=config.spec_options,
        )
        decoder: SpecDecoder = load_selection(config.spec_decoder)(spec_config, device)
        return decoder
