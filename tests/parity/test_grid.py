"""Greedy tokens equal transformers', and no pair of optimisations changes a token, for every family."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dovetail.contracts.executor import KVGroup, Progress
from dovetail.engine.engine import Engine
from dovetail.kv.groups import most_pages
from dovetail.runner.executor import LocalExecutor

from .conftest import Reference, config_for
from .grid import COUNT, FACTORS, Combination, Course, Prompt, covering, options_for, pairs, prompts
from .test_families import FAMILIES, random_checkpoint

NOISE = 0.1
"""Relative noise on the weights of a draft model: right often, and wrong often."""
PLENTY = 1 / 8
"""GiB of KV cache from which the size of a block is measured."""
ROOMS = (2, 1.25, 1.5, 1.75, 2.5, 3)
"""Sizes of a cache in which running requests may run out of blocks, in longest requests."""


@dataclass(slots=True)
class Subject:
    """A checkpoint, a draft model for it, and what it must answer."""

    model: Path
    draft: Path
    prompts: list[Prompt]
    _expected: dict[bool, list[list[int]]] = field(default_factory=dict)
    _sizes: dict[str, tuple[float, tuple[KVGroup, ...]]] = field(default_factory=dict)

    def expected(self, quantized: bool) -> list[list[int]]:
        """Tokens of each request alone on an engine with everything off; those of plain weights are transformers'."""
        if quantized not in self._expected:
            names = ["quantized"] if quantized else []
            engine = self.engine({**self.options(names), "max_num_seqs": 1})
            course = Course([], self.prompts)
            course.run(lambda: engine)
            self._expected[quantized] = course.outputs
        return self._expected[quantized]

    def check(self, names: Sequence[str]) -> None:
        """Run one combination; with ``preemption``, in ever other caches until the requests get in each other's way."""
        happened: set[str] = set()
        for room in ROOMS if "preemption" in names else (None,):
            course = Course(names, self.prompts)
            course.run(partial(self.engine, self.options(names, room)))
            expected = self.expected("quantized" in names)
            wrong = [i for i, (mine, theirs) in enumerate(zip(course.outputs, expected, strict=True)) if mine != theirs]
            assert not wrong, f"requests {wrong} differ: {course.outputs[wrong[0]]} instead of {expected[wrong[0]]}"
            happened |= course.happened
            if happened == set(names):
                return
        raise AssertionError(f"{set(names) - happened} had no effect, so these runs show nothing about it")

    def options(self, names: Sequence[str], room: float | None = None) -> dict[str, Any]:
        """``room``: the cache's size in longest requests."""
        options = options_for(names, str(self.draft))
        if room is not None:
            per_block, groups = self._blocks(options)
            step = min(options["max_num_batched_tokens"], options["max_model_len"])
            longest = sum(most_pages(g.window, options["max_model_len"], step, options["block_size"]) for g in groups)
            options["kv_cache_memory"] = (math.ceil(longest * room) + 1) * per_block
        return options

    def _blocks(self, options: dict[str, Any]) -> tuple[float, tuple[KVGroup, ...]]:
        """GiB that a block takes, with a draft model's beside it, and the KV groups."""
        key = str({**options, "quantization": None})
        if key not in self._sizes:
            executor = LocalExecutor(config_for(self.model, **{**options, "kv_cache_memory": PLENTY}))
            info = executor.load(Progress())
            executor.close()
            self._sizes[key] = PLENTY / info.num_blocks, info.groups
        return self._sizes[key]

    def engine(self, options: dict[str, Any]) -> Engine:
        """Resolve, load, and start."""
        config = config_for(self.model, **options)
        executor = LocalExecutor(config)
        return Engine(config, executor, executor.load(Progress()))


def noisy_copy(model: Path, to: Path) -> None:
    """The same model with noise on its weights."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(1 + NOISE * torch.randn(parameter.shape, generator=g))
    theirs.save_pretrained(to)


Subjects = Callable[[str], Subject]


@pytest.fixture(scope="module")
def subject_named(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Subjects:
    """Subjects by family; ``demo`` is the trained one."""
    made: dict[str, Subject] = {}

    def get(name: str) -> Subject:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = demo_model if name == "demo" else folder / "model"
            if name != "demo":
                random_checkpoint(name, model)
            noisy_copy(model, folder / "draft")
            reference = Reference(model)
            made[name] = Subject(model, folder / "draft", prompts(reference.model.config.vocab_size))
        return made[name]

    return get


@pytest.mark.parametrize("family", ["demo", *FAMILIES])
def test_plain_engine_equals_transformers(subject_named: Subjects, family: str) -> None:
    """What every combination is compared with."""
    subject = subject_named(family)
    reference = Reference(subject.model)
    tokens = subject.expected(quantized=False)
    for i, prompt in enumerate(subject.prompts):
        if not prompt.sampling:
            assert tokens[i] == reference.greedy(prompt.token_ids, COUNT), f"prompt {i}"


@pytest.mark.parametrize("names", pairs(), ids="-".join)
def test_pair_changes_nothing(subject_named: Subjects, names: Combination) -> None:
    """The trained model, each pair by itself."""
    subject_named("demo").check(names)


@pytest.mark.parametrize("names", covering(), ids="-".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_combination_changes_nothing(subject_named: Subjects, family: str, names: Combination) -> None:
    """Every family, all pairs within few combinations."""
    subject_named(family).check(names)


@pytest.mark.slow
@pytest.mark.parametrize("names", pairs(), ids="-".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_pair_changes_nothing_in_any_family(subject_named: Subjects, family: str, names: Combination) -> None:
    """Every family, each pair by itself."""
    subject_named(family).check(names)


def test_the_grid_is_complete() -> None:
    """Every two factors are together somewhere, in the pairs and in the combinations, or exclude each other."""
    together = {pair for row in covering() for pair in combinations(row, 2)}
    assert together == set(pairs())
    excluded = {("ngram", "draft"), ("ngram", "async"), ("draft", "async")}
    assert set(combinations(FACTORS, 2)) - together == excluded
