"""Drafts from each request's own past."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dovetail.contracts.specdec import Drafts, SpecConfig, SpecDecoder, SpecState
from dovetail.errors import ConfigError
from dovetail_suffix.automaton import SuffixAutomaton


class SuffixDecoder(SpecDecoder):
    """One automaton per request, which grows with it."""

    def __init__(self, config: SpecConfig, device: torch.device) -> None:
        self._min_match = config.options["min_match"]
        if type(self._min_match) is not int or self._min_match < 1:
            raise ConfigError(
                f"--speculative-config has min_match {self._min_match!r}; give a whole number of at least 1."
            )
        self._automata: dict[int, SuffixAutomaton] = {}

    def propose(self, state: SpecState) -> Drafts:
        """The continuation of each request's longest repeated suffix."""
        counts_S = state.num_tokens_S.tolist()
        drafts = []
        for slot, limit in zip(state.slots, state.limit, strict=True):
            automaton = self._automata.setdefault(slot, SuffixAutomaton())
            for token in state.tokens_SL[slot, len(automaton.tokens) : counts_S[slot]].tolist():
                automaton.append(token)
            drafts.append(automaton.continuation(self._min_match, limit))
        return Drafts(token_ids=drafts)

    def release(self, slots: Sequence[int]) -> None:
        """Forget these requests."""
        for slot in slots:
            self._automata.pop(slot, None)
