"""The parity grid: what may be switched on, which combinations there are, and how one of them is run.

Every factor is an optimisation, or something that happens to a server. None may change a token: neither greedy ones nor
those of a seeded request that samples.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

from dovetail.engine.engine import Engine
from dovetail.messages import EngineStats
from dovetail.testing.engines import engine_request

COUNT = 24
"""Tokens per request."""
PLAIN: Mapping[str, Any] = {
    "enable_prefix_caching": False,
    "max_num_batched_tokens": 640,
    "max_num_seqs": 10,
    "max_model_len": 128,
    "block_size": 64,
    "attention": "cpu",
}
"""Everything off: all prompts fit one step, in large pages, with room for everyone."""


def _nothing(stats: EngineStats) -> bool:
    return True


@dataclass(frozen=True, kw_only=True, slots=True)
class Factor:
    """Something that must not change tokens.

    Attributes:
        options: of the engine; ``"{draft}"`` stands for the draft checkpoint.
        happened: whether statistics show that it took effect.
        excludes: factors that set the same option, or cannot be had together.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    happened: Callable[[EngineStats], bool] = _nothing
    excludes: tuple[str, ...] = ()


def _speculation(**section: Any) -> dict[str, Any]:
    return {"speculative_config": {"num_speculative_tokens": 3, **section}}


FACTORS: dict[str, Factor] = {
    "prefix_cache": Factor(options={"enable_prefix_caching": True}, happened=lambda stats: stats.prefix_hits > 0),
    "chunked_prefill": Factor(options={"max_num_batched_tokens": 24}),
    "preemption": Factor(options={"block_size": 32}, happened=lambda stats: stats.num_preemptions > 0),
    "small_pages": Factor(options={"block_size": 16}),
    "ngram": Factor(
        options=_speculation(method="ngram"),
        happened=lambda stats: stats.drafts_proposed > 0,
        excludes=("draft", "async"),
    ),
    "draft": Factor(
        options=_speculation(method="draft_model", model="{draft}"),
        happened=lambda stats: 0 < stats.drafts_accepted < stats.drafts_proposed,
        excludes=("ngram", "async"),
    ),
    "quantized": Factor(options={"quantization": "int8"}),
    "batch_mix": Factor(),
    "priority": Factor(options={"scheduling_policy": "priority"}),
    "abort": Factor(),
    "restart": Factor(),
    "attention": Factor(options={"attention": "blocked"}),
    "async": Factor(options={"async_scheduling": True}, excludes=("ngram", "draft")),
}

Combination = tuple[str, ...]


def pairs() -> list[Combination]:
    """Every pair of factors that can be on together."""
    return [pair for pair in combinations(FACTORS, 2) if _compatible(pair)]


def covering() -> list[Combination]:
    """Few combinations in which any two factors are on together, off together, and each on without the other."""
    left = {(a, b, states) for a, b in combinations(FACTORS, 2) for states in product((True, False), repeat=2)}
    left -= {(a, b, (True, True)) for a, b in combinations(FACTORS, 2) if not _compatible((a, b))}
    rng = random.Random(1)
    rows: list[Combination] = []
    while left:
        candidates = [tuple(name for name in FACTORS if rng.random() < 0.5) for _ in range(200)]
        row = max(filter(_compatible, candidates), key=lambda names: len(_seen(names) & left))
        rows.append(row)
        left -= _seen(row)
    return rows


def _seen(names: Sequence[str]) -> set[tuple[str, str, tuple[bool, bool]]]:
    return {(a, b, (a in names, b in names)) for a, b in combinations(FACTORS, 2)}


def _compatible(names: Sequence[str]) -> bool:
    return not any(other in FACTORS[name].excludes for name in names for other in names)


def options_for(names: Sequence[str], draft: str) -> dict[str, Any]:
    """The engine's options with these factors on, except for the tight cache of ``preemption``."""
    options: dict[str, Any] = dict(PLAIN)
    for name in names:
        options.update(FACTORS[name].options)
    if "speculative_config" in options:
        section = options["speculative_config"]
        options["speculative_config"] = {key: draft if v == "{draft}" else v for key, v in section.items()}
    return options


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request: a prompt, and the sampling parameters of a request that is not greedy."""

    token_ids: list[int]
    sampling: Mapping[str, Any]


def prompts(vocab_size: int) -> list[Prompt]:
    """Ragged prompts; every other request samples.

    Four begin alike, for more than a large page; two have the same small pages in another order.
    """
    rng = random.Random(11)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(16, vocab_size) for _ in range(count)]

    shared, motif, one, two = tokens(70), tokens(6), tokens(32), tokens(32)
    token_ids = [shared + tokens(n) for n in (1, 9, 24, 26)] + [tokens(3), motif * 7 + tokens(2), tokens(50)]
    token_ids += [one + two + tokens(5), two + one + tokens(5)]
    chance = {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "seed": 5}
    return [Prompt(ids, chance if i % 2 else {}) for i, ids in enumerate(token_ids)]


@dataclass(slots=True)
class Course:
    """One combination on its way: outputs so far by prompt, and which factors the engines' statistics showed."""

    names: Sequence[str]
    prompts: Sequence[Prompt]
    outputs: list[list[int]] = field(default_factory=list)
    happened: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Begin with nothing."""
        self.outputs = [[] for _ in self.prompts]

    def run(self, make: Callable[[], Engine]) -> None:
        """Run every request to its end; ``restart`` goes on in a second engine, from where the first one was killed."""
        if "restart" in self.names:
            self._drive(make(), max_steps=7)
        self._drive(make(), max_steps=10_000)

    def _drive(self, engine: Engine, max_steps: int) -> None:
        waiting = [i for i, output in enumerate(self.outputs) if len(output) < COUNT]
        if "batch_mix" in self.names:
            random.Random(2).shuffle(waiting)
        for step in range(max_steps):
            arriving, waiting = self._split(waiting, step)
            for index in arriving:
                self._add(engine, index)
            self._disturb(engine, step)
            if not engine.has_work():
                break
            for delta in engine.step():
                if delta.request_id.isdigit():
                    self.outputs[int(delta.request_id)] += delta.new_token_ids
        stats = engine.stats()
        self.happened |= {name for name in self.names if FACTORS[name].happened(stats)}
        engine.close()

    def _split(self, waiting: list[int], step: int) -> tuple[list[int], list[int]]:
        """Who arrives now: all at once, or one after the other."""
        count = len(waiting) if "batch_mix" not in self.names else 2 if step == 0 else 1
        return waiting[:count], waiting[count:]

    def _add(self, engine: Engine, index: int) -> None:
        prompt, output = self.prompts[index], self.outputs[index]
        engine.add(
            engine_request(
                prompt.token_ids + output,
                request_id=str(index),
                max_tokens=COUNT - len(output),
                ignore_eos=True,
                priority=(5 * index) % 3 if "priority" in self.names else 0,
                **prompt.sampling,
            )
        )

    def _disturb(self, engine: Engine, step: int) -> None:
        """Neighbours whose own tokens nobody looks at."""
        if "abort" in self.names and step in (0, 2):
            begun = [*self.prompts[step].token_ids[:66], 17, 18, 19]
            engine.add(engine_request(begun, request_id=f"aborted-{step}", max_tokens=40, priority=-1))
        if "abort" in self.names and step in (4, 6):
            engine.abort([f"aborted-{step - 4}"])
        if "batch_mix" in self.names and step % 4 == 1 and step < 20:
            chance = {"temperature": 1.0, "seed": step}
            engine.add(engine_request([20 + step, 21, 22], request_id=f"mixed-{step}", max_tokens=5, **chance))
