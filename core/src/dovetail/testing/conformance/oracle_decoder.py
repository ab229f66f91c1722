"""A speculator that knows the tiny model's greedy tokens, and is wrong now and then."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dovetail.contracts.specdec import Drafts, SpecConfig, SpecDecoder, SpecState
from dovetail.testing.conformance import tiny

WRONG_EVERY = 3


class OracleDecoder(SpecDecoder):
    """Drafts what the model itself will say, but every third position a neighbour of that token."""

    def __init__(self, config: SpecConfig, device: torch.device) -> None:
        self._count = config.num_speculative_tokens

    def propose(self, state: SpecState) -> Drafts:
        """One dense pass per draft."""
        drafts = []
        for slot, limit in zip(state.slots, state.limit, strict=True):
            known = state.tokens_SL[slot, : int(state.num_tokens_S[slot])].tolist()
            drafts.append(self._draft(known, min(limit, self._count)))
        return Drafts(token_ids=drafts)

    def release(self, slots: Sequence[int]) -> None:
        """Nothing is kept."""

    @staticmethod
    def _draft(known: Sequence[int], count: int) -> list[int]:
        tokens = list(known)
        for _ in range(count):
            token = int(tiny.dense_logits(tokens)[-1].argmax())
            tokens.append((token + (len(tokens) % WRONG_EVERY == 0)) % tiny.VOCAB_SIZE)
        return tokens[len(known) :]
