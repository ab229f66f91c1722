"""Engines over the demo model, with and without speculation."""

from __future__ import annotations

import random
import shutil

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from dovetail.checkpoint import demo
from dovetail.config import Selection
from dovetail.contracts.executor import Progress
from dovetail.engine.engine import Engine
from dovetail.options import EngineOptions
from dovetail.plugins.host import PluginHost
from dovetail.resolver import resolve
from dovetail.runner.executor import LocalExecutor

SMALL = {"max_model_len": 128, "max_num_seqs": 8, "max_num_batched_tokens": 128, "dtype": "float32", "num_threads": 2}
NOISE = 0.25
"""Standard deviation of the noise in the perturbed draft's weights, relative to theirs."""


def part(target):
    return Selection(name=target, target=target, distribution="tests", version="0", why="for a test", plugin="tests")


@pytest.fixture(scope="session")
def registries():
    return PluginHost().discover().registries


@pytest.fixture(scope="session")
def target(registries):
    """The demo checkpoint."""
    return demo(next(entry.manifest.demo for entry in registries.models if entry.manifest.demo))


@pytest.fixture(scope="session")
def perturbed(target, tmp_path_factory):
    """The demo checkpoint with noise in its weights: drafts that are right now and then."""
    path = tmp_path_factory.mktemp("perturbed") / "draft"
    shutil.copytree(target, path)
    generator = torch.Generator().manual_seed(0)
    weights = load_file(target / "model.safetensors")
    for name, weight in weights.items():
        if weight.dim() == 2:
            noise = torch.randn(weight.shape, generator=generator) * weight.float().std() * NOISE
            weights[name] = (weight.float() + noise).to(weight.dtype)
    (path / "model.safetensors").unlink()
    save_file(weights, path / "model.safetensors")
    return path


@pytest.fixture
def make_engine(registries, target):
    """Build engines; they are closed afterwards."""
    engines = []

    def make(section=None, *, ladder=False, decoder=None, **options):
        if ladder:
            options["attention"] = "reference"
        asked = EngineOptions(model=str(target), speculative_config=section, **{**SMALL, **options})
        config = resolve(asked, registries)
        if ladder:
            platform = part("dovetail.testing.platforms:LadderPlatform")
            config = msgspec.structs.replace(config, platform=platform)
        if decoder is not None:
            config = msgspec.structs.replace(config, spec_decoder=part(decoder))
        executor = LocalExecutor(config)
        engine = Engine(config, executor, executor.load(Progress()))
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def prompts_for(seed=7):
    """Ragged prompts; half of them share a prefix of two pages."""
    rng = random.Random(seed)
    shared = [1, *(rng.randrange(16, 8192) for _ in range(34))]
    alone = [[1, *(rng.randrange(16, 8192) for _ in range(n))] for n in (1, 9, 30, 60)]
    repeats = [1, *[rng.randrange(16, 8192) for _ in range(5)] * 4]
    return [*alone, *(shared + [rng.randrange(16, 8192) for _ in range(n)] for n in (1, 12, 25)), repeats]


@pytest.fixture(scope="session")
def prompts():
    return prompts_for()
