"""DenseRules: the rules of :mod:`.logit_rules` in tables over the vocabulary, for platforms that compile sampling.

Every row of a step goes through every rule, which changes nothing where a slot does not have it: so shapes depend on
nothing but the bucket. The tables belong to compiled steps. What enters a slot is written by one of them, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import Bucket, Platform
from dovetail.messages import NewRow
from dovetail.runner.sample_inputs import RuleInputs
from dovetail.runner.sample_rows import SampleRows
from dovetail.sampling_params import SamplingParams

CHUNK = 1024
"""Tokens of a request that are written to the tables at a time."""
NEUTRAL = SamplingParams()


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleTables:
    """By slot; the last one is nobody's.

    Attributes:
        bias_BV: float32, added; ``-inf`` for tokens that are not allowed.
        stops_BV: bool, forbidden while a request is too short.
        factors_B3, counts_BV, in_prompt_BV: as :func:`dovetail.ops.reference.penalize` takes them.
    """

    bias_BV: Tensor
    stops_BV: Tensor
    factors_B3: Tensor
    counts_BV: Tensor
    in_prompt_BV: Tensor

    @classmethod
    def empty(cls, slots: int, vocab_size: int, device: torch.device) -> RuleTables:
        """No slot has a rule."""
        shape = (slots, vocab_size)
        return cls(
            bias_BV=torch.zeros(shape, device=device),
            stops_BV=torch.zeros(shape, dtype=torch.bool, device=device),
            factors_B3=torch.tensor([1.0, 0.0, 0.0], device=device).repeat(slots, 1),
            counts_BV=torch.zeros(shape, dtype=torch.int32, device=device),
            in_prompt_BV=torch.zeros(shape, dtype=torch.bool, device=device),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleEntry:
    """A request's row in the tables, and some of its tokens.

    Attributes:
        slot_1: int64.
        first_1: bool: forget the tokens that were written before.
        factors_13, bias_1V, stops_1V: as in :class:`RuleTables`.
        tokens_C: int64, with padding.
        prompt_C, output_C: int32: 1 where the token is one of the prompt, or of the output.
    """

    slot_1: Tensor
    first_1: Tensor
    factors_13: Tensor
    bias_1V: Tensor
    stops_1V: Tensor
    tokens_C: Tensor
    prompt_C: Tensor
    output_C: Tensor


class DenseRules:
    """Applies the rules of each slot's request, in the order bias, allowed tokens, min_tokens, penalties."""

    def __init__(
        self, max_num_seqs: int, vocab_size: int, most_drafts: int, platform: Platform, ops: OpTable, bucket: Bucket
    ) -> None:
        """Allocate the tables.

        Args:
            most_drafts: of a request.
            bucket: what writing to the tables is compiled for.
        """
        self._vocab_size = vocab_size
        self._most_drafts = most_drafts
        self._platform = platform
        self._ops = ops
        self._bucket = bucket
        self._tables = platform.adopt(RuleTables.empty(max_num_seqs + 1, vocab_size, platform.device))
        self._write: Callable[..., Any] | None = None
        self._always = np.zeros(max_num_seqs + 1, dtype=bool)
        self._stops_until = np.zeros(max_num_seqs + 1, dtype=np.int64)
        self._written = np.zeros(max_num_seqs + 1, dtype=bool)

    def enter(self, row: NewRow) -> None:
        """Write a request's rules into its slot, in place of those before."""
        params, slot = row.params, row.slot
        stops = self._stops(row)
        penalised = _factors(params) != _factors(NEUTRAL)
        self._always[slot] = penalised or bool(params.logit_bias or params.allowed_token_ids)
        self._stops_until[slot] = row.prompt_len + params.min_tokens if stops else 0
        has_rules = self._always[slot] or bool(stops)
        if has_rules or self._written[slot]:
            self._put(row, stops)
        self._written[slot] = has_rules

    def any_for(self, rows: SampleRows) -> bool:
        """Whether a rule changes the logits of any row."""
        slots_S = rows.slots_S
        return bool((self._always[slots_S] | (rows.positions_S < self._stops_until[slots_S])).any())

    def prepare(self, rows: SampleRows) -> RuleInputs:
        """What :meth:`apply` and :meth:`observe` read, on the device."""
        short_S = rows.positions_S < self._stops_until[rows.slots_S]
        upload = self._platform.upload
        return RuleInputs(
            slots_R=upload(torch.from_numpy(rows.slots_R)),
            slots_S=upload(torch.from_numpy(rows.slots_S)),
            short_S=upload(torch.from_numpy(short_S)),
            earlier_SK=upload(torch.from_numpy(rows.all_earlier_drafts(self._most_drafts))),
        )

    def apply(self, logits_SV: Tensor, inputs: RuleInputs) -> Tensor:
        """Float32 logits with every rule applied. In compiled steps only."""
        tables, slots_S = self._tables, inputs.slots_S
        forbidden_SV = tables.stops_BV[slots_S] & inputs.short_S.unsqueeze(1)
        ruled_SV = (logits_SV + tables.bias_BV[slots_S]).masked_fill(forbidden_SV, -torch.inf)
        rows_S = torch.arange(len(slots_S), device=logits_SV.device)
        factors, counts, in_prompt = tables.factors_B3, tables.counts_BV, tables.in_prompt_BV
        if self._most_drafts:  # those before a row count as output
            factors, counts, in_prompt = (table[slots_S] for table in (factors, counts, in_prompt))
            counts = _counted(counts, rows_S, inputs.earlier_SK)
            slots_S = rows_S
        self._ops.penalize(ruled_SV, rows_S, slots_S, factors, counts, in_prompt)
        return ruled_SV

    def observe(self, inputs: RuleInputs, tokens_RK: Tensor) -> None:
        """Count new output tokens; negative ones stand for nothing. In compiled steps only."""
        _counted(self._tables.counts_BV, inputs.slots_R, tokens_RK)

    def warm_up(self) -> None:
        """Compile what writes to the tables, unless something was written already."""
        if self._write is not None:
            return
        nobody = len(self._always) - 1
        row = NewRow(
            slot=nobody,
            request_id="",
            token_ids=[],
            prompt_len=0,
            params=NEUTRAL,
            eos_token_ids=(),
            seed=0,
            block_ids=[],
        )
        self._put(row, [])

    def _stops(self, row: NewRow) -> list[int]:
        if not row.params.min_tokens:
            return []
        stops = {*row.params.stop_token_ids, *(() if row.params.ignore_eos else row.eos_token_ids)}
        # Some checkpoints name an end-of-sequence token that their output head does not have.
        return [token for token in stops if 0 <= token < self._vocab_size]

    def _put(self, row: NewRow, stops: list[int]) -> None:
        if self._write is None:
            write: Callable[..., Any] = self._enter
            self._write = self._platform.compile(write, self._bucket)
        stops_1V = torch.zeros(1, self._vocab_size, dtype=torch.bool)
        stops_1V[0, stops] = True
        entry = {
            "slot_1": torch.tensor([row.slot]),
            "factors_13": torch.tensor([_factors(row.params)]),
            "bias_1V": self._bias(row.params),
            "stops_1V": stops_1V,
        }
        for first in range(0, max(len(row.token_ids), 1), CHUNK):
            tensors = entry | _chunk(row, first)
            self._write(RuleEntry(**{name: self._platform.upload(tensor) for name, tensor in tensors.items()}))

    def _bias(self, params: SamplingParams) -> Tensor:
        bias_1V = torch.zeros(1, self._vocab_size)
        for token, value in (params.logit_bias or {}).items():
            bias_1V[0, token] = value
        if params.allowed_token_ids is None:
            return bias_1V
        allowed = torch.tensor(params.allowed_token_ids)
        return torch.full_like(bias_1V, -torch.inf).index_copy_(1, allowed, bias_1V[:, allowed])

    def _enter(self, entry: RuleEntry) -> None:
        tables, slot = self._tables, entry.slot_1
        old = ~entry.first_1.unsqueeze(1)
        count = tables.counts_BV.new_zeros(self._vocab_size)
        prompt_V, output_V = (count.index_add(0, entry.tokens_C, of_C) for of_C in (entry.prompt_C, entry.output_C))
        tables.bias_BV[slot] = entry.bias_1V
        tables.stops_BV[slot] = entry.stops_1V
        tables.factors_B3[slot] = entry.factors_13
        tables.counts_BV[slot] = tables.counts_BV[slot] * old + output_V
        tables.in_prompt_BV[slot] = (tables.in_prompt_BV[slot] & old) | (prompt_V > 0)


def _factors(params: SamplingParams) -> list[float]:
    return [params.repetition_penalty, params.frequency_penalty, params.presence_penalty]


def _chunk(row: NewRow, first: int) -> dict[str, Tensor]:
    """A request's tokens from there on, as :class:`RuleEntry` takes them."""
    tokens_C, position_C = torch.zeros(CHUNK, dtype=torch.int64), torch.arange(first, first + CHUNK)
    tokens = row.token_ids[first : first + CHUNK]
    tokens_C[: len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    is_output_C = (position_C >= row.prompt_len) & (position_C < len(row.token_ids))
    return {
        "first_1": torch.tensor([first == 0]),
        "tokens_C": tokens_C,
        "prompt_C": (position_C < row.prompt_len).to(torch.int32),
        "output_C": is_output_C.to(torch.int32),
    }


def _counted(counts_BV: Tensor, rows_P: Tensor, tokens_PK: Tensor) -> Tensor:
    """Add tokens to the counts of each row's entry, in place; negative ones stand for nothing."""
    place = (rows_P.unsqueeze(1).expand_as(tokens_PK), tokens_PK.clamp(min=0))
    return counts_BV.index_put_(place, (tokens_PK >= 0).to(counts_BV.dtype), accumulate=True)
