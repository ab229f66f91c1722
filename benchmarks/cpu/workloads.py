"""The workloads: token ids only, the same for every engine, fresh prompts for every repetition.

Legend: C1 batch decode, C2 one stream (time to first token, time per token), C3 prefill, C4 shared prefix.
"""

import random
from dataclasses import dataclass

VOCAB = 32000


@dataclass(frozen=True)
class Workload:
    """``requests`` prompts of ``shared + unique`` tokens, each continued by exactly ``out`` greedy tokens."""

    name: str
    requests: int
    shared: int
    unique: int
    out: int

    def prompts(self, repetition: int) -> list[list[int]]:
        """Prompts of one repetition; no two repetitions share a prefix, so no cache survives from one to the next."""
        rng = random.Random(f"{self.name}/{repetition}")
        prefix = [rng.randrange(16, VOCAB) for _ in range(self.shared)]
        return [prefix + [rng.randrange(16, VOCAB) for _ in range(self.unique)] for _ in range(self.requests)]


WORKLOADS = {
    w.name: w
    for w in (
        Workload("C1", requests=32, shared=0, unique=128, out=64),
        Workload("C2", requests=1, shared=0, unique=128, out=64),
        Workload("C3", requests=8, shared=0, unique=512, out=1),
        Workload("C4", requests=16, shared=256, unique=32, out=16),
    )
}
