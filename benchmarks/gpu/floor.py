"""The floor of a workload: bytes that must be read and operations that must be computed, at the device's own rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engines.workloads import Workload

BYTES = 2
"""Of a bf16 number."""


@dataclass(frozen=True)
class Rates:
    """What the device reached: bytes per second read, operations per second of a large product."""

    read: float
    flops: float

    def seconds(self, moved: float, computed: float) -> float:
        """Whatever takes longer; the other hides behind it."""
        return max(moved / self.read, computed / self.flops)


@dataclass(frozen=True)
class Shape:
    """A decoder's size, counted from its config.json.

    Attributes:
        dense: weights of all layers that every token uses.
        expert: weights of one expert, in all layers.
        experts, chosen: how many there are, and how many a token uses; 0 without any.
        head: weights of the output head.
        kv_bytes: of one token in all layers.
        pair_operations: of attention per query and visible key, in all layers.
    """

    dense: int
    expert: int
    experts: int
    chosen: int
    head: int
    kv_bytes: int
    pair_operations: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """Count."""
        width, layers, experts = config["hidden_size"], config["num_hidden_layers"], config.get("num_experts", 0)
        heads, kv_heads, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        layer = width * size * (2 * heads + 2 * kv_heads)
        layer += width * experts if experts else 3 * width * config["intermediate_size"]
        return cls(
            dense=layers * layer,
            expert=layers * 3 * width * config["moe_intermediate_size"] if experts else 0,
            experts=experts,
            chosen=config["num_experts_per_tok"] if experts else 0,
            head=width * config["vocab_size"],
            kv_bytes=layers * 2 * kv_heads * size * BYTES,
            pair_operations=layers * 4 * heads * size,
        )

    def touched(self, tokens: float) -> float:
        """Experts per layer that a step of ``tokens`` is expected to read, if every choice is as likely."""
        return self.experts * (1 - (1 - self.chosen / self.experts) ** tokens) if self.experts else 0.0

    def step(self, rates: Rates, tokens: float, sampled: int, pairs: float, kv_tokens: float) -> float:
        """Seconds of one pass: each weight that is used read once, each product computed."""
        weights = self.dense + self.expert * self.touched(tokens) + self.head
        moved = BYTES * weights + self.kv_bytes * kv_tokens
        computed = 2 * tokens * (self.dense + self.expert * self.chosen) + 2 * sampled * self.head
        return rates.seconds(moved, computed + pairs * self.pair_operations)

    def floor(self, work: Workload, rates: Rates) -> float:
        """Seconds below which nothing gets: all prompts in one pass, then one pass per token.

        What requests share is computed once and read once: it fits into the device's caches.
        """
        shared, unique, count = work.shared, work.unique, work.requests
        pairs = shared**2 / 2 + count * unique * (shared + unique / 2)
        prompts = self.step(rates, shared + count * unique, count, pairs, 0)
        own = unique + work.out / 2
        decode = self.step(rates, count, count, count * (shared + own), shared + count * own)
        return prompts + (work.out - 1) * decode
