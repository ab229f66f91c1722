"""What a speculative decoder sees, without an engine: slots with tokens, and a small draft model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from dovetail.contracts.model import ModelContext
from dovetail.contracts.ops import OpTable
from dovetail.contracts.specdec import SpecState
from dovetail.layers.linear import Unquantized
from dovetail.testing.conformance import tiny
from dovetail.testing.conformance.dense import DenseModel, Part

MAX_MODEL_LEN = 96
NUM_DRAFTS = 4


class Slots:
    """The engine's slots. What lies beyond a request's verified tokens is arbitrary, as it is in an engine.

    Args:
        count: of slots.
        seed: of what is arbitrary.
    """

    def __init__(self, count: int = 6, seed: int = 0) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self.tokens_SL = self._arbitrary(count, MAX_MODEL_LEN + 1)
        self.num_tokens_S = torch.zeros(count, dtype=torch.int64)
        self.temperature_S = torch.zeros(count)
        self.seeds_S = torch.arange(count) * 1000

    def put(self, slot: int, token_ids: Sequence[int], *, temperature: float = 0.0, seed: int | None = None) -> None:
        """Let these be the verified tokens of the request in a slot."""
        self.tokens_SL[slot] = self._arbitrary(MAX_MODEL_LEN + 1)
        self.tokens_SL[slot, : len(token_ids)] = torch.tensor(token_ids)
        self.num_tokens_S[slot] = len(token_ids)
        self.temperature_S[slot] = temperature
        if seed is not None:
            self.seeds_S[slot] = seed

    def state(self, slots: Sequence[int], limit: Sequence[int] | None = None) -> SpecState:
        """What a decoder is given for these slots; by default as many drafts as fit into the context."""
        room = [max(0, min(NUM_DRAFTS, MAX_MODEL_LEN - int(self.num_tokens_S[slot]) - 1)) for slot in slots]
        return SpecState(
            slots=list(slots),
            tokens_SL=self.tokens_SL,
            num_tokens_S=self.num_tokens_S,
            temperature_S=self.temperature_S,
            seeds_S=self.seeds_S,
            limit=room if limit is None else list(limit),
        )

    def _arbitrary(self, *shape: int) -> Tensor:
        return torch.randint(tiny.VOCAB_SIZE, shape, generator=self._random)


class ScratchDraft:
    """A :class:`~dovetail.contracts.specdec.DraftModel` that computes everything anew, and notes how it is used.

    Args:
        passed_over: slots for which it has no room.

    Attributes:
        calls: of ``catch_up``.
        extensions: tokens of each ``extend`` after the last ``catch_up``, by entry of its state.
    """

    def __init__(self, passed_over: Collection[int] = ()) -> None:
        self.calls = 0
        self.extensions: dict[int, list[int]] = {}
        self._passed_over = passed_over
        self._model = _tiny_model()
        self._entries: list[int] = []

    def catch_up(self, state: SpecState) -> tuple[list[int], Tensor]:
        """Logits after the verified tokens of each request that wants drafts."""
        self.calls += 1
        pairs = enumerate(zip(state.slots, state.limit, strict=True))
        self._entries = [i for i, (slot, limit) in pairs if limit > 0 and slot not in self._passed_over]
        self.extensions = {entry: [] for entry in self._entries}
        if not self._entries:
            return [], torch.empty(0, 0)
        self._model.forget()
        parts = []
        for entry in self._entries:
            slot = state.slots[entry]
            parts.append(Part(entry, state.tokens_SL[slot, : int(state.num_tokens_S[slot])].tolist()))
        return list(self._entries), torch.stack([logits_TV[-1] for logits_TV in self._model.step(*parts)])

    def extend(self, token_ids_R: Tensor) -> Tensor:
        """Logits after one more token of each."""
        assert token_ids_R.shape == (len(self._entries),), f"tokens of shape {tuple(token_ids_R.shape)}"
        assert token_ids_R.dtype == torch.int64, f"tokens of {token_ids_R.dtype}"
        for entry, token in zip(self._entries, token_ids_R.tolist(), strict=True):
            self.extensions[entry].append(token)
            assert len(self.extensions[entry]) < NUM_DRAFTS, "extended more often than there are drafts"
        parts = [Part(entry, self.extensions[entry][-1:]) for entry in self._entries]
        return torch.cat(self._model.step(*parts))


@cache
def _tiny_model() -> DenseModel:
    context = ModelContext(
        ops=OpTable(),
        dtype=torch.float32,
        device=torch.device("cpu"),
        quant=Unquantized(),
        max_model_len=MAX_MODEL_LEN + NUM_DRAFTS,
    )
    with TemporaryDirectory() as folder:
        return DenseModel(tiny.TinyModel, tiny.WINDOWED, tiny.write_checkpoint(Path(folder), tiny.WINDOWED), context)
