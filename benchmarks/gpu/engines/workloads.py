"""The workloads: token ids only, the same for every engine, new in every repetition."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

WARM_TOKENS = 8


@dataclass(frozen=True)
class Workload:
    """``requests`` prompts of ``shared + unique`` tokens, each continued by exactly ``out`` greedy tokens.

    Attributes:
        latency: whether one more run for the first token tells the time per token.
    """

    name: str
    requests: int
    shared: int
    unique: int
    out: int
    latency: bool = False

    def prompts(self, vocab: int, seed: str) -> list[list[int]]:
        """Prompts of one repetition; none begins as one of another seed."""
        rng = random.Random(f"{self.name}/{seed}")
        head = [rng.randrange(1000, vocab - 1000) for _ in range(self.shared)]
        return [head + [rng.randrange(1000, vocab - 1000) for _ in range(self.unique)] for _ in range(self.requests)]

    def short(self) -> Workload:
        """As many requests and few tokens: what an engine compiles and captures on first sight, it does here."""
        return replace(self, shared=min(self.shared, 128), unique=min(self.unique, 128), out=min(self.out, WARM_TOKENS))

    def first(self) -> Workload:
        """Up to the first token."""
        return replace(self, out=1)


WORKLOADS = {
    work.name: work
    for work in (
        Workload("W3", requests=1, shared=0, unique=128, out=256, latency=True),
        Workload("W2", requests=64, shared=0, unique=128, out=512, latency=True),
        Workload("W4", requests=64, shared=0, unique=2048, out=1),
        Workload("W5", requests=256, shared=1024, unique=64, out=64),
        Workload("W1", requests=512, shared=0, unique=512, out=128),
    )
}
FIRST_ANSWER = Workload("first answer", requests=1, shared=0, unique=128, out=WARM_TOKENS)
"""With it, an engine counts as ready."""
