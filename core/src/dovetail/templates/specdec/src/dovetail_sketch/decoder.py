"""Drafts from the request's own past."""

from collections.abc import Sequence

import torch

from dovetail.contracts.specdec import Drafts, SpecConfig, SpecDecoder, SpecState
from dovetail.errors import ConfigError


class SketchDecoder(SpecDecoder):
    """Stateless: everything it needs is in the verified tokens."""

    def __init__(self, config: SpecConfig, device: torch.device) -> None:
        self._match = config.options["match"]
        if not isinstance(self._match, int) or self._match < 1:
            raise ConfigError(f"--speculative-config has match {self._match!r}; give a whole number of at least 1.")

    def propose(self, state: SpecState) -> Drafts:
        drafts = []
        for slot, limit in zip(state.slots, state.limit, strict=True):
            known = state.tokens_SL[slot, : int(state.num_tokens_S[slot])].tolist()
            drafts.append(self._continuation(known)[:limit])
        return Drafts(token_ids=drafts)

    def release(self, slots: Sequence[int]) -> None:
        """Nothing is remembered."""

    def _continuation(self, known: list[int]) -> list[int]:
        """What followed the latest earlier occurrence of the last tokens."""
        last = known[-self._match :]
        for end in range(len(known) - 1, self._match - 1, -1):
            if known[end - self._match : end] == last:
                return known[end:]
        return []
