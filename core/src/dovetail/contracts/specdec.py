"""SpecDecoder: proposes draft tokens.

Acceptance lives in the core (``runner/verify.py``): losslessness never depends on a plugin.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class DraftModel(Protocol):
    """A second, smaller model of the engine, which the core loads and runs for decoders that draft with one.

    It shares the engine's platform, vocabulary and slots, and keeps a KV cache of its own. The core follows what
    becomes of the drafts: whoever calls ``catch_up`` once per ``propose`` need not know what is stored already.
    """

    def catch_up(self, state: SpecState) -> tuple[list[int], Tensor]:
        """Compute the verified tokens that it has not seen, of every request whose ``limit`` is above 0.

        At most one step's tokens are computed at once, so a long prompt may take several calls; and requests for which
        its cache has no room at the moment are passed over.

        Returns:
            Indices into ``state.slots`` of the requests that have caught up, and float logits ``[R, V]`` of each one's
            next token, on the device.
        """
        ...

    def extend(self, token_ids_R: Tensor) -> Tensor:
        """Append one draft to each request of the last ``catch_up``, at most ``num_speculative_tokens - 1`` times.

        Args:
            token_ids_R: int64, on the device. They must be what ``propose`` returns, as far as it returns them.

        Returns:
            Logits ``[R, V]`` of the token after it.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecConfig:
    """The resolved ``--speculative-config``.

    Attributes:
        num_speculative_tokens: most drafts per request and step.
        max_num_seqs, max_model_len, vocab_size: sizes of the engine.
        options: the plugin's own section.
        draft: the draft model, if the manifest says ``needs_draft_model``.
    """

    num_speculative_tokens: int
    max_num_seqs: int
    max_model_len: int
    vocab_size: int
    options: Mapping[str, Any]
    draft: DraftModel | None = None


@dataclass(kw_only=True, slots=True)
class SpecState:
    """What a decoder sees after each step.

    Attributes:
        slots: the requests that may be drafted for.
        tokens_SL: int64 ``[max_num_seqs, L]``, L > max_model_len: every request's verified tokens, by slot.
        num_tokens_S: int64 ``[max_num_seqs]``, on the host: how many of each row are verified.
        temperature_S: float32 sampling temperature by slot, on the host; 0 is greedy.
        seeds_S: int64 seed of each slot's noise, on the host; see ``dovetail.ops.random``.
        limit: per entry of ``slots``, how many drafts still fit into the request's own limits.
    """

    slots: Sequence[int]
    tokens_SL: Tensor
    num_tokens_S: Tensor
    temperature_S: Tensor
    seeds_S: Tensor
    limit: Sequence[int]


@dataclass(kw_only=True, slots=True)
class Drafts:
    """Proposals, one entry per entry of ``SpecState.slots``.

    Attributes:
        token_ids: at most ``limit`` tokens each; an empty list skips the request.
        probs: float32 ``[len(slots), num_speculative_tokens, V]``: the distribution each draft was drawn from, for
            rejection sampling. With None drafts stay as long as they equal what the model samples itself.
    """

    token_ids: list[list[int]]
    probs: Tensor | None = None


class SpecDecoder(ABC):
    """Proposes continuations of running requests."""

    @abstractmethod
    def __init__(self, config: SpecConfig, device: torch.device) -> None:
        """Prepare.

        Phase: load. Order: 1. Times: once. May raise: ConfigError.

        Raises:
            ConfigError: an option cannot be honoured.
        """
        ...

    @abstractmethod
    def propose(self, state: SpecState) -> Drafts:
        """Draft for the given requests, at least one. Any proposal within ``limit`` and the vocabulary is safe:
        verification keeps the output exact.

        Phase: step. Order: 1. Times: once, after sampling. May raise: nothing.
        """
        ...

    @abstractmethod
    def release(self, slots: Sequence[int]) -> None:
        """The requests in these slots left; forget them before the slots are used again.

        Phase: step. Order: 2. Times: once, before the next step, if requests left. May raise: nothing.
        """
        ...
