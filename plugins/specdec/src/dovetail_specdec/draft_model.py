"""Drafts from a smaller model, which the core loads and runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.contracts.specdec import Drafts, SpecConfig, SpecDecoder, SpecState
from dovetail.errors import ConfigError
from dovetail.ops.random import Stream, gumbel, row_keys

COUPLED, REJECTION = "coupled", "rejection"


class DraftModelDecoder(SpecDecoder):
    """Draws drafts from the draft model's own distribution; greedy requests get its most likely tokens.

    ``coupled`` draws with the noise that the model itself will sample with at that position: where the distributions
    are close, both choose the same token, and the output is that without speculation. ``rejection`` draws with noise of
    its own and hands the probabilities on: the output is other tokens of the same distribution.
    """

    def __init__(self, config: SpecConfig, device: torch.device) -> None:
        """Read ``sampling``.

        Raises:
            ConfigError: it is neither of the two ways.
        """
        assert config.draft is not None, "the manifest asks for a draft model"
        sampling = config.options["sampling"]
        if sampling not in (COUPLED, REJECTION):
            raise ConfigError(
                f"--speculative-config has sampling {sampling!r}; choose {COUPLED!r} (the same tokens as without "
                f"speculation) or {REJECTION!r} (more drafts accepted)."
            )
        self._model = config.draft
        self._rejection = sampling == REJECTION
        self._num_speculative_tokens = config.num_speculative_tokens

    def propose(self, state: SpecState) -> Drafts:
        """Draft for every request that the draft model has caught up with."""
        token_ids: list[list[int]] = [[] for _ in state.slots]
        entries, logits_RV = self._model.catch_up(state)
        if not entries:
            return Drafts(token_ids=token_ids)
        rows = _Rows.of(state, entries, logits_RV.device, Stream.DRAFT if self._rejection else Stream.SAMPLE)
        probs = None
        if self._rejection and not rows.all_greedy:
            shape = (len(token_ids), self._num_speculative_tokens, logits_RV.shape[1])
            probs = torch.zeros(shape, device=logits_RV.device)
        drafts: list[Tensor] = []
        for i in range(max(state.limit[entry] for entry in entries)):
            if drafts:
                logits_RV = self._model.extend(drafts[-1])
            if probs is not None:
                probs[entries, i] = rows.scale(logits_RV).softmax(-1)
            drafts.append(rows.choose(logits_RV, i))
        for entry, tokens in zip(entries, torch.stack(drafts, 1).tolist(), strict=True):
            token_ids[entry] = tokens[: state.limit[entry]]
        return Drafts(token_ids=token_ids, probs=probs)

    def release(self, slots: Sequence[int]) -> None:
        """Nothing is remembered: the core keeps the draft model's cache."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """How the drafts of one round are drawn.

    Attributes:
        temperature_R1: 1 for greedy requests.
        positions_R: index, in its request, of the first draft.
        all_greedy: known on the host.
    """

    greedy_R: Tensor
    temperature_R1: Tensor
    seeds_R: Tensor
    positions_R: Tensor
    stream: Stream
    all_greedy: bool

    @classmethod
    def of(cls, state: SpecState, entries: Sequence[int], device: torch.device, stream: Stream) -> _Rows:
        """The rows of ``catch_up``."""
        slots = [state.slots[entry] for entry in entries]
        temperature_R = state.temperature_S[slots]
        greedy_R = temperature_R == 0
        return cls(
            greedy_R=greedy_R.to(device),
            temperature_R1=torch.where(greedy_R, 1.0, temperature_R).unsqueeze(1).to(device),
            seeds_R=state.seeds_S[slots].to(device),
            positions_R=state.num_tokens_S[slots].to(device),
            stream=stream,
            all_greedy=bool(greedy_R.all()),
        )

    def scale(self, logits_RV: Tensor) -> Tensor:
        """Logits over temperature, float32."""
        return logits_RV.to(torch.float32) / self.temperature_R1

    def choose(self, logits_RV: Tensor, index: int) -> Tensor:
        """The ``index``-th draft of each request."""
        if self.all_greedy:
            return logits_RV.argmax(-1)
        keys_R = row_keys(self.seeds_R, self.positions_R + index, self.stream)
        noise_RV = gumbel(keys_R, torch.arange(logits_RV.shape[1], device=logits_RV.device))
        drawn_R = noise_RV.add_(self.scale(logits_RV)).argmax(-1)
        return torch.where(self.greedy_R, logits_RV.argmax(-1), drawn_R)
