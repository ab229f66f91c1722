"""Engines over real checkpoints, and transformers as the independent reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from dovetail.checkpoint import demo
from dovetail.config import EngineConfig, Selection
from dovetail.contracts.executor import Progress
from dovetail.engine.engine import Engine
from dovetail.options import EngineOptions
from dovetail.plugins.host import PluginHost
from dovetail.resolver import resolve
from dovetail.runner.executor import LocalExecutor
from dovetail_models import plugin as models_plugin

PLATFORMS = {
    "reference": "dovetail.testing.platforms:ReferencePlatform",
    "ladder": "dovetail.testing.platforms:LadderPlatform",
    "whole": "dovetail.testing.platforms:WholePlatform",
}
MakeEngine = Callable[..., Engine]


def config_for(
    model: Path | str, platform: str = "cpu", spec_decoder: str | None = None, **options: Any
) -> EngineConfig:
    """Resolve as a user's command would; test platforms and test speculators take the resolved ones' places."""
    drafts = options.pop("num_speculative_tokens", 0)
    attention = "auto" if platform == "cpu" else "reference"
    asked = EngineOptions(**{"model": str(model), "dtype": "float32", "attention": attention, **options})
    config = resolve(asked, PluginHost().discover().registries)
    if platform != "cpu":
        config = msgspec.structs.replace(config, platform=_part(PLATFORMS[platform]))
    if spec_decoder is not None:
        config = msgspec.structs.replace(config, spec_decoder=_part(spec_decoder), num_speculative_tokens=drafts)
    return config


def _part(target: str) -> Selection:
    return Selection(name=target, target=target, distribution="tests", version="0", why="for a test")


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    """Build engines; they are closed afterwards."""
    engines: list[Engine] = []

    def make(model: Path | str, platform: str = "cpu", **options: Any) -> Engine:
        config = config_for(model, platform, **options)
        executor = LocalExecutor(config)
        engine = Engine(config, executor, executor.load(Progress()))
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The embedded demo checkpoint."""
    found: list[Path] = []

    def register(manifest: Any, target: str) -> None:
        if manifest.demo:
            found.append(demo(manifest.demo))

    models_plugin.dovetail_register_models(register)
    return found[0]


class Reference:
    """transformers, in fp32, one prompt at a time."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        self.model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """``count`` greedy tokens; end-of-sequence does not stop."""
        ids = torch.tensor([prompt])
        tokens = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        new: list[int] = tokens[0, len(prompt) :].tolist()
        return new

    @torch.inference_mode()
    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """Log-probabilities ``[T, V]`` of what follows each token."""
        return self.model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)


@pytest.fixture(scope="session")
def demo_reference(demo_model: Path) -> Reference:
    """transformers' model of the demo checkpoint."""
    return Reference(demo_model)
