"""A model alone: dense causal attention over lists instead of the engine's paged cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dovetail.contracts.attention import AttentionSpec
from dovetail.contracts.executor import Progress
from dovetail.contracts.model import Model, ModelContext
from dovetail.contracts.ops import OpTable
from dovetail.layers.linear import Unquantized
from dovetail.runner.loader import load_weights


class DenseAttention:
    """Attention of one request; remembers the keys and values of every layer."""

    def __init__(self, specs: list[AttentionSpec]) -> None:
        self._specs = specs
        self._keys: list[list[Tensor]] = [[] for _ in specs]
        self._values: list[list[Tensor]] = [[] for _ in specs]

    def __call__(self, layer: int, q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor) -> Tensor:
        spec = self._specs[layer]
        self._keys[layer].append(k_TNK)
        self._values[layer].append(v_TNK)
        group = spec.num_heads // spec.num_kv_heads
        keys = torch.cat(self._keys[layer]).repeat_interleave(group, dim=1)
        values = torch.cat(self._values[layer]).repeat_interleave(group, dim=1)
        ends = torch.arange(len(keys) - len(q_THK), len(keys)).unsqueeze(1)
        seen = torch.arange(len(keys)).unsqueeze(0)
        mask = seen <= ends
        if spec.window is not None:
            mask &= seen > ends - spec.window
        scores = torch.einsum("thk,shk->hts", q_THK.double(), keys.double()) * spec.scale
        if spec.soft_cap is not None:
            scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return torch.einsum("hts,shk->thk", weights, values.double()).flatten(1).to(q_THK.dtype)


class Dense:
    """One family's model of a checkpoint, run without an engine."""

    def __init__(
        self,
        family: type[Model],
        path: Path,
        ops: OpTable | None = None,
        positions: int = 512,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        config = json.loads((path / "config.json").read_text())
        self._specs = list(family.facts(config).attention)
        self.model = family(
            config,
            ModelContext(
                ops=ops or OpTable(),
                dtype=dtype,
                device=torch.device("cpu"),
                quant=Unquantized(),
                max_model_len=positions,
            ),
        )
        load_weights(self.model, path, Progress())

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> Tensor:
        """Logits ``[T, V]`` of every position, in one pass."""
        positions_T = torch.arange(len(token_ids))
        return self.model.logits(self.model.forward(torch.tensor(token_ids), positions_T, DenseAttention(self._specs)))

    @torch.inference_mode()
    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """Prefill in two chunks, then one token at a time."""
        attend = DenseAttention(self._specs)
        tokens = list(prompt)
        half = len(prompt) // 2
        self.model.forward(torch.tensor(tokens[:half]), torch.arange(half), attend)
        start = half
        while len(tokens) < len(prompt) + count:
            hidden_TD = self.model.forward(torch.tensor(tokens[start:]), torch.arange(start, len(tokens)), attend)
            start = len(tokens)
            tokens.append(int(self.model.logits(hidden_TD[-1:]).argmax()))
        return tokens[len(prompt) :]


@pytest.fixture
def dense() -> type[Dense]:
    """:class:`Dense`; folders of tests share helpers by fixture."""
    torch.set_num_threads(1)
    return Dense
