"""LogitRules: what a request demands of its logits before temperature: bias, allowed tokens, min_tokens,
penalties.

Each rule's tables exist only once a request uses it, and a step touches only the rows that have it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from dovetail.messages import NewRow
from dovetail.runner.sample_rows import SampleRows


class LogitRules:
    """Applies the rules of each slot's request, in the order bias, allowed tokens, min_tokens, penalties."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self._bias = _TokenTable(max_num_seqs, device)
        self._allowed = _TokenTable(max_num_seqs, device)
        self._stops = _TokenTable(max_num_seqs, device)
        self._stops_until = np.zeros(max_num_seqs, dtype=np.int64)
        self._penalties = _Penalties(max_num_seqs, vocab_size, device)

    def enter(self, row: NewRow) -> None:
        """Write a request's rules into its slot, in place of those before."""
        params, slot = row.params, row.slot
        bias = params.logit_bias or {}
        self._bias.put(slot, list(bias), list(bias.values()))
        self._allowed.put(slot, sorted({*(params.allowed_token_ids or ())}))
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else row.eos_token_ids)}
        # Some checkpoints name an end-of-sequence token that their output head does not have.
        maskable = sorted(token for token in stops if 0 <= token < self._vocab_size)
        self._stops.put(slot, maskable if params.min_tokens else ())
        self._stops_until[slot] = row.prompt_len + params.min_tokens
        self._penalties.enter(row)

    def any_for(self, slot: int) -> bool:
        """Whether a rule may ever change the slot's logits."""
        return any(rule.used[slot] for rule in (self._bias, self._allowed, self._stops, self._penalties))

    def apply(self, logits_SV: Tensor, rows: SampleRows) -> Tensor:
        """The logits with every rule applied: the input itself if no row has one, else a float32 copy."""
        slots_S = rows.slots_S
        biased = np.flatnonzero(self._bias.used[slots_S])
        limited = np.flatnonzero(self._allowed.used[slots_S])
        too_short_S = rows.positions_S < self._stops_until[slots_S]
        unstoppable = np.flatnonzero(self._stops.used[slots_S] & too_short_S)
        penalised = np.flatnonzero(self._penalties.used[slots_S])
        if not (len(biased) or len(limited) or len(unstoppable) or len(penalised)):
            return logits_SV
        logits_SV = logits_SV.to(torch.float32, copy=True)
        if len(biased):
            self._bias.add(logits_SV, biased, slots_S[biased])
        if len(limited):
            self._allowed.keep_only(logits_SV, limited, slots_S[limited])
        if len(unstoppable):
            self._stops.mask(logits_SV, unstoppable, slots_S[unstoppable])
        if len(penalised):
            index = torch.from_numpy(penalised).to(self._device)
            logits_SV[index] = self._penalties.apply(logits_SV[index], rows, penalised)
        return logits_SV

    def observe(self, slots: Sequence[int], token_ids: Sequence[Sequence[int]]) -> None:
        """Count new output tokens, one list per slot."""
        self._penalties.observe(slots, token_ids)


class _TokenTable:
    """A few tokens per slot, each with a value; padded to the longest, which grows."""

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self.used = np.zeros(max_num_seqs, dtype=bool)
        self._ids = torch.zeros(max_num_seqs, 1, dtype=torch.int64, device=device)
        self._values = torch.zeros(max_num_seqs, 1, dtype=torch.float32, device=device)

    def put(self, slot: int, token_ids: Sequence[int], values: Sequence[float] | None = None) -> None:
        """Replace a slot's tokens. Padding repeats the first token with value 0."""
        self.used[slot] = len(token_ids) > 0
        if not len(token_ids):
            return
        self._reserve(len(token_ids))
        self._ids[slot] = token_ids[0]
        self._ids[slot, : len(token_ids)] = torch.tensor(token_ids).to(self._ids.device)
        if values is not None:
            self._values[slot] = 0.0
            self._values[slot, : len(values)] = torch.tensor(values, dtype=torch.float32).to(self._ids.device)

    def add(self, logits_SV: Tensor, rows: np.ndarray, slots: np.ndarray) -> None:
        """Add each token's value to its logit, in place."""
        values = self._values[torch.from_numpy(slots).to(self._values.device)]
        logits_SV.index_put_(self._gather(rows, slots), values, accumulate=True)

    def mask(self, logits_SV: Tensor, rows: np.ndarray, slots: np.ndarray) -> None:
        """Forbid the tokens, in place."""
        logits_SV[self._gather(rows, slots)] = -torch.inf

    def keep_only(self, logits_SV: Tensor, rows: np.ndarray, slots: np.ndarray) -> None:
        """Forbid every other token, in place."""
        place = self._gather(rows, slots)
        kept = logits_SV[place]
        logits_SV[place[0].squeeze(1)] = -torch.inf
        logits_SV[place] = kept

    def _gather(self, rows: np.ndarray, slots: np.ndarray) -> tuple[Tensor, Tensor]:
        device = self._ids.device
        return torch.from_numpy(rows).to(device).unsqueeze(1), self._ids[torch.from_numpy(slots).to(device)]

    def _reserve(self, width: int) -> None:
        missing = width - self._ids.shape[1]
        if missing > 0:
            self._ids = torch.cat([self._ids, self._ids[:, :1].expand(-1, missing)], dim=1)
            zeros = self._values.new_zeros(len(self._values), missing)
            self._values = torch.cat([self._values, zeros], dim=1)


class _Penalties:
    """Repetition, frequency and presence penalties over dense token tables.

    Repetition (Keskar et al. 2019, arXiv:1909.05858) looks at prompt and output; frequency and presence, as
    OpenAI defines them, at the output alone.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self.used = np.zeros(max_num_seqs, dtype=bool)
        self._shape = (max_num_seqs, vocab_size)
        self._device = device
        self._factors = torch.zeros(max_num_seqs, 3, dtype=torch.float32, device=device)
        self._counts: Tensor | None = None
        self._in_prompt: Tensor | None = None

    def enter(self, row: NewRow) -> None:
        """Write a request's factors, and mark its prompt and output so far."""
        params, slot = row.params, row.slot
        factors = [params.repetition_penalty, params.frequency_penalty, params.presence_penalty]
        self.used[slot] = factors != [1.0, 0.0, 0.0]
        if not self.used[slot]:
            return
        counts, in_prompt = self._tables()
        self._factors[slot] = torch.tensor(factors).to(self._device)
        prompt = torch.tensor(row.token_ids[: row.prompt_len], dtype=torch.int64).to(self._device)
        in_prompt[slot] = False
        in_prompt[slot, prompt] = True
        counts[slot] = 0
        self._count(np.full(len(row.token_ids) - row.prompt_len, slot), row.token_ids[row.prompt_len :])

    def observe(self, slots: Sequence[int], token_ids: Sequence[Sequence[int]]) -> None:
        """Count new output tokens."""
        columns = zip(slots, token_ids, strict=True)
        pairs = [(slot, token) for slot, ids in columns if self.used[slot] for token in ids]
        if pairs:
            slots_, tokens = zip(*pairs, strict=True)
            self._count(np.array(slots_), tokens)

    def apply(self, logits_SV: Tensor, rows: SampleRows, chosen: np.ndarray) -> Tensor:
        """Penalised logits of the chosen rows; drafts before a row count as output."""
        counts, in_prompt = self._tables()
        slots_S = torch.from_numpy(rows.slots_S[chosen]).to(self._device)
        counts_SV = counts[slots_S]
        if rows.has_drafts:
            index, tokens = (torch.from_numpy(a).to(self._device) for a in rows.earlier_drafts(chosen))
            counts_SV.index_put_((index, tokens), counts_SV.new_ones(()), accumulate=True)
        repetition_S1, frequency_S1, presence_S1 = self._factors[slots_S].unsqueeze(2).unbind(1)
        seen_SV = (counts_SV > 0) | in_prompt[slots_S]
        repeated_SV = torch.where(logits_SV > 0, logits_SV / repetition_S1, logits_SV * repetition_S1)
        logits_SV = torch.where(seen_SV, repeated_SV, logits_SV)
        return logits_SV.sub_(frequency_S1 * counts_SV).sub_(presence_S1 * (counts_SV > 0))

    def _tables(self) -> tuple[Tensor, Tensor]:
        if self._counts is None or self._in_prompt is None:
            self._counts = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
            self._in_prompt = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
        return self._counts, self._in_prompt

    def _count(self, slots: np.ndarray, tokens: Iterable[int]) -> None:
        counts, _ = self._tables()
        tokens_ = torch.tensor([*tokens], dtype=torch.int64).to(self._device)
        place = (torch.from_numpy(slots).to(self._device), tokens_)
        counts.index_put_(place, counts.new_ones(()), accumulate=True)
