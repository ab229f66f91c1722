"""LogitRules: what a request demands of its logits before temperature: bias, allowed tokens, min_tokens,
penalties.

Each rule's tables exist only once a request uses it, and a step touches only the rows that have it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import Platform
from dovetail.messages import NewRow
from dovetail.runner.sample_rows import SampleRows


class LogitRules:
    """Applies the rules of each slot's request, in the order bias, allowed tokens, min_tokens, penalties."""

    def __init__(self, max_num_seqs: int, vocab_size: int, platform: Platform, ops: OpTable) -> None:
        self._vocab_size = vocab_size
        self._bias = _TokenTable(max_num_seqs, platform)
        self._allowed = _TokenTable(max_num_seqs, platform)
        self._stops = _TokenTable(max_num_seqs, platform)
        self._stops_until = np.zeros(max_num_seqs, dtype=np.int64)
        self._penalties = _Penalties(max_num_seqs, vocab_size, platform, ops)

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
            self._penalties.apply(logits_SV, rows, penalised)
        return logits_SV

    def observe(self, slots_R: np.ndarray, tokens_RK: Tensor) -> None:
        """Count new output tokens, a row per slot; negative ones stand for nothing."""
        self._penalties.observe(slots_R, tokens_RK)


class _TokenTable:
    """A few tokens per slot, each with a value; padded to the longest, which grows."""

    def __init__(self, max_num_seqs: int, platform: Platform) -> None:
        device = platform.device
        self._upload = platform.upload
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
        self._ids[slot, : len(token_ids)] = self._upload(torch.tensor(token_ids))
        if values is not None:
            self._values[slot] = 0.0
            self._values[slot, : len(values)] = self._upload(torch.tensor(values, dtype=torch.float32))

    def add(self, logits_SV: Tensor, rows: np.ndarray, slots: np.ndarray) -> None:
        """Add each token's value to its logit, in place."""
        values = self._values[self._upload(torch.from_numpy(slots))]
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
        rows_, slots_ = self._upload(torch.from_numpy(np.stack([rows, slots])))
        return rows_.unsqueeze(1), self._ids[slots_]

    def _reserve(self, width: int) -> None:
        missing = width - self._ids.shape[1]
        if missing > 0:
            self._ids = torch.cat([self._ids, self._ids[:, :1].expand(-1, missing)], dim=1)
            zeros = self._values.new_zeros(len(self._values), missing)
            self._values = torch.cat([self._values, zeros], dim=1)


class _Penalties:
    """Repetition, frequency and presence penalties over dense token tables."""

    def __init__(self, max_num_seqs: int, vocab_size: int, platform: Platform, ops: OpTable) -> None:
        self.used = np.zeros(max_num_seqs, dtype=bool)
        self._ops = ops
        self._shape = (max_num_seqs, vocab_size)
        self._device = platform.device
        self._upload = platform.upload
        self._factors = torch.zeros(max_num_seqs, 3, dtype=torch.float32, device=self._device)
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
        self._factors[slot] = self._upload(torch.tensor(factors))
        tokens = self._upload(torch.tensor(row.token_ids, dtype=torch.int64))
        in_prompt[slot] = False
        in_prompt[slot].index_fill_(0, tokens[: row.prompt_len], True)
        counts[slot] = 0
        output = tokens[row.prompt_len :]
        counts[slot].index_add_(0, output, torch.ones_like(output, dtype=counts.dtype))

    def observe(self, slots_R: np.ndarray, tokens_RK: Tensor) -> None:
        """Count new output tokens."""
        chosen = np.flatnonzero(self.used[slots_R])
        if not len(chosen):
            return
        counts, _ = self._tables()
        index, slots = self._upload(torch.from_numpy(np.stack([chosen, slots_R[chosen]])))
        new_RK = tokens_RK[index]
        place = (slots.unsqueeze(1).expand_as(new_RK), new_RK.clamp(min=0))
        counts.index_put_(place, (new_RK >= 0).to(counts.dtype), accumulate=True)

    def apply(self, logits_SV: Tensor, rows: SampleRows, chosen: np.ndarray) -> None:
        """Penalise the chosen rows in place; drafts before a row count as output."""
        counts, in_prompt = self._tables()
        factors = self._factors
        rows_P, slots_P = self._upload(torch.from_numpy(np.stack([chosen, rows.slots_S[chosen]])))
        if rows.has_drafts:
            factors, counts, in_prompt = (table[slots_P] for table in (factors, counts, in_prompt))
            index, tokens = self._upload(torch.from_numpy(np.stack(rows.earlier_drafts(chosen))))
            counts.index_put_((index, tokens), counts.new_ones(()), accumulate=True)
            slots_P = torch.arange(len(chosen), device=self._device)
        self._ops.penalize(logits_SV, rows_P, slots_P, factors, counts, in_prompt)

    def _tables(self) -> tuple[Tensor, Tensor]:
        if self._counts is None or self._in_prompt is None:
            self._counts = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
            self._in_prompt = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
        return self._counts, self._in_prompt
