"""SpecDecoder: proposes draft tokens.

Acceptance lives in the core (``runner/verify.py``): losslessness never depends on a plugin.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecConfig:
    """The resolved ``--speculative-config``.

    Attributes:
        num_speculative_tokens: most drafts per request and step.
        max_num_seqs, max_model_len, vocab_size: sizes of the engine.
        options: the plugin's own section.
    """

    num_speculative_tokens: int
    max_num_seqs: int
    max_model_len: int
    vocab_size: int
    options: Mapping[str, Any]


@dataclass(kw_only=True, slots=True)
class SpecState:
    """What a decoder sees after each step.

    Attributes:
        slots: the requests that may be drafted for.
        tokens_SL: int64 ``[max_num_seqs, L]``, L > max_model_len: every request's verified tokens, by slot.
        num_tokens_S: int64 ``[max_num_seqs]``, on the host: how many of each row are verified.
        temperature_S: float32 sampling temperature by slot; 0 is greedy.
        limit: per entry of ``slots``, how many drafts still fit into the request's own limits.
    """

    slots: Sequence[int]
    tokens_SL: Tensor
    num_tokens_S: Tensor
    temperature_S: Tensor
    limit: Sequence[int]


@dataclass(kw_only=True, slots=True)
class Drafts:
    """Proposals, one entry per entry of ``SpecState.slots``.

    Attributes:
        token_ids: at most ``limit`` tokens each; an empty list skips the request.
        probs: float32 ``[len(slots), num_speculative_tokens, V]``: the distribution each draft was drawn from, or
            None if drafts are deterministic (a point mass on the draft).
    """

    token_ids: list[list[int]]
    probs: Tensor | None = None


class SpecDecoder(ABC):
    """Proposes continuations of running requests."""

    @abstractmethod
    def __init__(self, config: SpecConfig, device: torch.device) -> None:
        """Prepare.

        Raises:
            ConfigError: an option cannot be honoured.
        """
        ...

    @abstractmethod
    def propose(self, state: SpecState) -> Drafts:
        """Draft for the given requests, at least one. Any proposal within ``limit`` and the vocabulary is safe:
        verification keeps the output exact."""
        ...

    @abstractmethod
    def release(self, slots: Sequence[int]) -> None:
        """The requests in these slots left; forget them before the slots are used again."""
        ...
