"""A model alone: dense causal attention over lists instead of the engine's paged cache."""

from __future__ import annotations

import json
from pathlib import Path

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
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return torch.einsum("hts,shk->thk", weights, values.double()).flatten(1).to(q_THK.dtype)


def load(family: type[Model], path: Path, dtype: torch.dtype = torch.float32, positions: int = 512) -> Model:
    """The family's model of a checkpoint, loaded."""
    config = json.loads((path / "config.json").read_text())
    context = ModelContext(
        ops=OpTable(), dtype=dtype, device=torch.device("cpu"), quant=Unquantized(), max_model_len=positions
    )
    model = family(config, context)
    load_weights(model, path, Progress())
    return model


@torch.inference_mode()
def logits_of(model: Model, specs: list[AttentionSpec], token_ids: list[int]) -> Tensor:
    """Logits of every position, in one pass."""
    hidden = model.forward(torch.tensor(token_ids), torch.arange(len(token_ids)), DenseAttention(specs))
    return model.logits(hidden)


@torch.inference_mode()
def greedy(model: Model, specs: list[AttentionSpec], prompt: list[int], count: int) -> list[int]:
    """Prefill in two chunks, then one token at a time."""
    attend = DenseAttention(specs)
    tokens = list(prompt)
    done = 0
    for end in (len(prompt) // 2, len(prompt)):
        hidden = model.forward(torch.tensor(tokens[done:end]), torch.arange(done, end), attend)
        done = end
    while len(tokens) < len(prompt) + count:
        tokens.append(int(model.logits(hidden[-1:]).argmax()))
        hidden = model.forward(torch.tensor(tokens[-1:]), torch.tensor([len(tokens) - 1]), attend)
    return tokens[len(prompt) :]
