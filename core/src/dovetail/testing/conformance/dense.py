"""A model without an engine: keys and values of each request in lists, and attention over them in float64."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dovetail.contracts.attention import AttentionSpec
from dovetail.contracts.executor import Progress
from dovetail.contracts.model import Model, ModelContext
from dovetail.runner.loader import load_weights

PADDING = -1
"""The request of padding tokens."""


class Part(NamedTuple):
    """Consecutive new tokens of one request within a step; request :data:`PADDING` has none that count."""

    request: int
    token_ids: Sequence[int]


class DenseAttention:
    """The :class:`~dovetail.contracts.model.StepAttention` of one model.

    Attributes:
        calls: of this step: layer, and the shapes of q, k and v.
    """

    def __init__(self, specs: Sequence[AttentionSpec]) -> None:
        self.calls: list[tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = []
        self._specs = specs
        self._stored: defaultdict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._parts: Sequence[Part] = ()

    def begin(self, parts: Sequence[Part]) -> None:
        """Say what the tokens of the next step are."""
        self._parts = parts
        self.calls = []

    def __call__(self, layer: int, q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor) -> Tensor:
        """Store, then attend within each request; rows of padding tokens are arbitrary."""
        self.calls.append((layer, tuple(q_THK.shape), tuple(k_TNK.shape), tuple(v_TNK.shape)))
        rows: list[Tensor] = []
        start = 0
        for request, token_ids in self._parts:
            own = slice(start, start + len(token_ids))
            start = own.stop
            if request == PADDING:
                rows.append(torch.full_like(q_THK[own], 3.0).flatten(1))
                continue
            stored = self._stored[layer, request]
            stored.append((k_TNK[own].clone(), v_TNK[own].clone()))
            k_LNK, v_LNK = (torch.cat(tensors) for tensors in zip(*stored, strict=True))
            rows.append(attend(q_THK[own], k_LNK, v_LNK, self._specs[layer]))
        return torch.cat(rows)


def attend(q_THK: Tensor, k_LNK: Tensor, v_LNK: Tensor, spec: AttentionSpec) -> Tensor:
    """Attention ``[T, H × K]`` of a request's last T tokens over all of its L tokens."""
    group = spec.num_heads // spec.num_kv_heads
    k_LHK, v_LHK = (x.double().repeat_interleave(group, dim=1) for x in (k_LNK, v_LNK))
    scores_HTL = torch.einsum("thk,lhk->htl", q_THK.double(), k_LHK) * spec.scale
    if spec.soft_cap is not None:
        scores_HTL = spec.soft_cap * torch.tanh(scores_HTL / spec.soft_cap)
    positions_L = torch.arange(len(k_LHK), device=q_THK.device)
    distance_TL = positions_L[len(k_LHK) - len(q_THK) :].unsqueeze(1) - positions_L
    hidden_TL = (distance_TL < 0) | (distance_TL >= (spec.window or len(k_LHK)))
    probs_HTL = scores_HTL.masked_fill(hidden_TL, -torch.inf).softmax(-1)
    return torch.einsum("htl,lhk->thk", probs_HTL, v_LHK).flatten(1).to(q_THK.dtype)


class DenseModel:
    """A loaded model, and steps of it. Requests are numbers; each grows with the steps that it takes part in."""

    def __init__(self, family: type[Model], hf_config: Mapping[str, Any], folder: Path, context: ModelContext) -> None:
        self._specs = list(family.facts(hf_config).attention)
        self._device = context.device
        with torch.inference_mode():
            self.model = family(hf_config, context)
            load_weights(self.model, folder, Progress())
        self.forget()

    def forget(self) -> None:
        """Begin anew, without requests."""
        self.attention = DenseAttention(self._specs)
        self._lengths: dict[int, int] = {}

    @torch.inference_mode()
    def hidden(self, *parts: Part) -> Tensor:
        """Hidden states ``[T, D]`` of one step."""
        positions: list[int] = []
        for request, token_ids in parts:
            start = 0 if request == PADDING else self._lengths.get(request, 0)
            step = 0 if request == PADDING else 1
            positions += [start + step * i for i in range(len(token_ids))]
            self._lengths[request] = start + len(token_ids)
        tokens = [token for part in parts for token in part.token_ids]
        self.attention.begin(parts)
        return self.model.forward(self._tensor(tokens), self._tensor(positions), self.attention)

    @torch.inference_mode()
    def step(self, *parts: Part) -> list[Tensor]:
        """Logits of one step on the host: ``[tokens, V]`` for each part."""
        logits_TV = self.model.logits(self.hidden(*parts)).cpu()
        return list(torch.split(logits_TV, [len(part.token_ids) for part in parts]))

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits ``[T, V]`` of a sequence on its own, in one step."""
        self.forget()
        return self.step(Part(0, token_ids))[0]

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The ``count`` greedy tokens after a prompt."""
        self.forget()
        tokens = list(prompt)
        new = list(prompt)
        while len(tokens) < len(prompt) + count:
            new = [int(self.step(Part(0, new))[0][-1].argmax())]
            tokens += new
        return tokens[len(prompt) :]

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
