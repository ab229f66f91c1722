"""A decoder for tests: drafts with the draft model, and notes what it drafted after which tokens."""

from __future__ import annotations

from dovetail.contracts.specdec import Drafts, SpecState
from dovetail_specdec.draft_model import DraftModelDecoder

ROUNDS: list[tuple[list[int], list[int]]] = []
"""Known tokens and the drafts after them; a test empties it."""


class RecordingDecoder(DraftModelDecoder):
    """Drafts as its base class does."""

    def propose(self, state: SpecState) -> Drafts:
        """Draft, and take note."""
        drafts = super().propose(state)
        for slot, ids in zip(state.slots, drafts.token_ids, strict=True):
            if ids:
                ROUNDS.append((state.tokens_SL[slot, : int(state.num_tokens_S[slot])].tolist(), ids))
        return drafts
