"""A speculator for tests: drafts that are right or wrong, by the position they stand at."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dovetail.contracts.specdec import Drafts, SpecConfig, SpecDecoder, SpecState

SCRIPTS: list[list[int]] = []
"""Token sequences whose continuations are drafted; a test fills it."""


class ScriptedDecoder(SpecDecoder):
    """Continues a request from the script that it follows; every third position is spoilt."""

    def __init__(self, config: SpecConfig, device: torch.device) -> None:
        self._count = config.num_speculative_tokens
        self._vocab_size = config.vocab_size

    def propose(self, state: SpecState) -> Drafts:
        """Draft as many tokens as the limit allows."""
        drafts = []
        for slot, limit in zip(state.slots, state.limit, strict=True):
            known = state.tokens_SL[slot, : int(state.num_tokens_S[slot])].tolist()
            script = next((s for s in SCRIPTS if s[: len(known)] == known), known)
            tokens = script[len(known) : len(known) + min(limit, self._count)]
            drafts.append([self._spoil(len(known) + i, token) for i, token in enumerate(tokens)])
        return Drafts(token_ids=drafts)

    def release(self, slots: Sequence[int]) -> None:
        """Nothing is remembered."""

    def _spoil(self, position: int, token: int) -> int:
        return (token + 1) % self._vocab_size if position % 3 == 0 else token


class CarelessDecoder(ScriptedDecoder):
    """Drafts what the contract forbids."""

    def propose(self, state: SpecState) -> Drafts:
        """A token beyond the vocabulary, for everyone."""
        return Drafts(token_ids=[[self._vocab_size] for _ in state.slots])


class EagerDecoder(ScriptedDecoder):
    """Drafts more than it may."""

    def propose(self, state: SpecState) -> Drafts:
        """One token above the limit."""
        return Drafts(token_ids=[[0] * (limit + 1) for limit in state.limit])
