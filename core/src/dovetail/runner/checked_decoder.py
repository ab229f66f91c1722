"""A speculator that is held to its contract and its manifest."""

from __future__ import annotations

from collections.abc import Sequence

from dovetail.config import Selection
from dovetail.contracts.specdec import Drafts, SpecConfig, SpecDecoder, SpecState
from dovetail.errors import PluginRunError


class CheckedDecoder(SpecDecoder):
    """Passes everything on, and refuses proposals that the verifier could not make sense of."""

    def __init__(self, decoder: SpecDecoder, part: Selection, config: SpecConfig) -> None:
        self._decoder = decoder
        self._part = part
        self._shape = (config.num_speculative_tokens, config.vocab_size)

    def propose(self, state: SpecState) -> Drafts:
        """The decoder's proposal.

        Raises:
            PluginRunError: it breaks the contract or the manifest; names the owner.
        """
        drafts = self._decoder.propose(state)
        if len(drafts.token_ids) != len(state.slots):
            raise self._broken(f"drafted for {len(drafts.token_ids)} requests where {len(state.slots)} were asked for")
        for ids, limit in zip(drafts.token_ids, state.limit, strict=True):
            self._check_tokens(ids, limit)
        if drafts.probs is not None:
            self._check_probs(tuple(drafts.probs.shape), len(state.slots))
        return drafts

    def release(self, slots: Sequence[int]) -> None:
        """Pass it on."""
        self._decoder.release(slots)

    def _check_tokens(self, ids: Sequence[int], limit: int) -> None:
        if len(ids) > limit:
            raise self._broken(f"drafted {len(ids)} tokens where SpecState.limit was {limit}")
        vocab_size = self._shape[1]
        foreign = [token for token in ids if not 0 <= token < vocab_size]
        if foreign:
            raise self._broken(f"drafted {foreign}, outside the vocabulary of {vocab_size}")

    def _check_probs(self, shape: tuple[int, ...], num_slots: int) -> None:
        if self._part.claims.get("probabilities") is False:
            raise self._broken("returned probabilities, and its manifest says probabilities=False")
        wanted = (num_slots, *self._shape)
        if shape != wanted:
            raise self._broken(f"returned probabilities of shape {list(shape)} instead of {list(wanted)}")

    def _broken(self, what: str) -> PluginRunError:
        part = self._part
        return PluginRunError(
            f"{type(self._decoder).__qualname__}.propose of {part.owner} {what}. Install a release of "
            f"{part.distribution} that repairs this, or leave out --speculative-config."
        )
