"""Prompt lookup: text repeats itself, so what followed the last tokens before may follow them again.

Saxena 2023, "Prompt Lookup Decoding". Nothing is computed on the device, and drafting costs microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dovetail.contracts.specdec import Drafts, SpecConfig, SpecDecoder, SpecState
from dovetail.errors import ConfigError


class NgramDecoder(SpecDecoder):
    """Drafts from each request's own tokens, of which it keeps a copy on the host."""

    def __init__(self, config: SpecConfig, device: torch.device) -> None:
        """Read ``prompt_lookup_min`` and ``prompt_lookup_max``.

        Raises:
            ConfigError: they are no lengths, or the first exceeds the second.
        """
        self._min = _length("prompt_lookup_min", config)
        self._max = _length("prompt_lookup_max", config)
        if self._min > self._max:
            raise ConfigError(
                f"--speculative-config has prompt_lookup_min {self._min} above prompt_lookup_max {self._max}; lower "
                "the first or raise the second."
            )
        self._tokens_SL = np.zeros((config.max_num_seqs, config.max_model_len + 1), dtype=np.int32)
        self._seen_S = np.zeros(config.max_num_seqs, dtype=np.int64)

    def propose(self, state: SpecState) -> Drafts:
        """Continue the latest earlier occurrence of the longest possible suffix."""
        self._copy_unseen(state)
        drafts = []
        for slot, limit in zip(state.slots, state.limit, strict=True):
            known_L = self._tokens_SL[slot, : self._seen_S[slot]]
            drafts.append(continuation(known_L, self._min, self._max, limit))
        return Drafts(token_ids=drafts)

    def release(self, slots: Sequence[int]) -> None:
        """Forget the copies."""
        self._seen_S[slots] = 0

    def _copy_unseen(self, state: SpecState) -> None:
        """Bring the copies up to date, with one transfer for all requests."""
        slots_R = np.array(state.slots)
        known_R = state.num_tokens_S.numpy()[slots_R]
        new_R = known_R - self._seen_S[slots_R]
        slots_T = np.repeat(slots_R, new_R)
        positions_T = np.arange(len(slots_T)) + np.repeat(known_R - np.cumsum(new_R), new_R)
        device = state.tokens_SL.device
        tokens_T = state.tokens_SL[torch.from_numpy(slots_T).to(device), torch.from_numpy(positions_T).to(device)]
        self._tokens_SL[slots_T, positions_T] = tokens_T.cpu().numpy()
        self._seen_S[slots_R] = known_R


def continuation(known_L: np.ndarray, shortest: int, longest: int, count: int) -> list[int]:
    """What followed the last tokens at an earlier place, ``count`` tokens; nothing if there is no such place.

    Of all earlier places where the last ``longest`` tokens stand, or as many of them as possible but at least
    ``shortest``, the latest is taken. One comparison with all tokens finds candidates; later ones look at those alone.
    A copy that reaches the end goes on with its own beginning, as repeated text does.
    """
    end, matched = len(known_L), 1
    starts = np.flatnonzero(known_L[:-1] == known_L[-1]) + 1  # what follows each earlier place
    while matched < longest:
        more = starts[starts > matched]
        more = more[known_L[more - matched - 1] == known_L[end - matched - 1]]
        if not len(more):
            break
        starts, matched = more, matched + 1
    if not len(starts) or matched < shortest:
        return []
    start = int(starts[-1])
    tokens: list[int] = known_L[start + np.arange(count) % (end - start)].tolist()
    return tokens


def _length(name: str, config: SpecConfig) -> int:
    value = config.options[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"--speculative-config has {name} {value!r}; give a whole number of at least 1.")
    return value
