"""Engines for tests of parts that need one: reference operations and attention, small pages, little room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dovetail.config import EngineConfig, Selection
from dovetail.contracts.executor import Progress
from dovetail.contracts.model import ModelFacts
from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import Platform, PlatformConfig
from dovetail.engine.engine import Engine
from dovetail.runner.executor import LocalExecutor
from dovetail.testing.conformance.subject import registered
from dovetail.testing.engines import engine_config, engine_request, run_until_idle

SIZES: Mapping[str, Any] = {
    "max_model_len": 96,
    "max_num_seqs": 3,
    "max_num_batched_tokens": 16,
    "block_size": 4,
    "num_threads": 1,
}


def core_part(target: str) -> Selection:
    """A part that the core itself brings."""
    name = target.rpartition(":")[2]
    return Selection(name=name, target=target, distribution="dovetail-core", version="0", why="tested")


ATTENTION = core_part("dovetail.platforms.cpu.reference_attention:ReferenceAttention")
PLAIN = core_part("dovetail.layers.linear:Unquantized")


def reference_platform(name: str | None = None) -> tuple[torch.device, OpTable]:
    """Device and float32 operations of the platform of this name; None is the host with the reference operations."""
    if name is None:
        return torch.device("cpu"), OpTable()
    platform: Platform = registered(name).find("platforms").cls(PlatformConfig(num_threads=1))
    return platform.device, OpTable.resolve(platform.ops(torch.float32), owner=f"platform {name}")


def model_config(
    model: Selection,
    hf_config: Mapping[str, Any],
    folder: Path,
    facts: ModelFacts,
    *,
    platform: str = "ReferencePlatform",
    **changes: Any,
) -> EngineConfig:
    """What runs the checkpoint in ``folder`` in float32.

    Args:
        platform: a class of :mod:`dovetail.testing.platforms`.
        changes: further fields of :class:`EngineConfig`.
    """
    given = {
        "model": model,
        "platform": core_part(f"dovetail.testing.platforms:{platform}"),
        "attention": ATTENTION,
        "quant": PLAIN,
        "vocab_size": facts.vocab_size,
        **SIZES,
        **changes,
    }
    return engine_config(model_path=str(folder), model_name="tiny", hf_config=dict(hf_config), **given)


def generate(config: EngineConfig, prompts: Sequence[Sequence[int]], **params: Any) -> list[list[int]]:
    """Run all prompts together; returns each one's tokens. Sampled requests are seeded by their number.

    Args:
        params: fields of :class:`SamplingParams`; greedy by default.
    """
    executor = LocalExecutor(config)
    engine = Engine(config, executor, executor.load(Progress()))
    try:
        for i, prompt in enumerate(prompts):
            engine.add(engine_request(prompt, request_id=str(i), **{"seed": i, **params}))
        completions = run_until_idle(engine)
    finally:
        engine.close()
    return [completions[str(i)].token_ids for i in range(len(prompts))]
