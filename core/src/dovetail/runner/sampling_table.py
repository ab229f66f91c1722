"""SamplingTable: sampling parameters by slot, written when a request enters, gathered by index each step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dovetail.contracts.platform import Platform
from dovetail.messages import NewRow
from dovetail.ops.random import signed64
from dovetail.ops.sampling import SamplingTensors
from dovetail.runner.sample_rows import SampleRows
from dovetail.sampling_params import SamplingParams

GREEDY_BELOW = 1e-5
"""Temperatures below this would overflow float32 logits; such a distribution is its most likely token."""


def effective_temperature(params: SamplingParams) -> float:
    """The temperature that a request is sampled with; 0 is greedy."""
    return 0.0 if params.temperature < GREEDY_BELOW else params.temperature


class SamplingTable:
    """Columns of device tensors, and host flags that decide which work a step can leave out."""

    def __init__(self, max_num_seqs: int, vocab_size: int, platform: Platform) -> None:
        self._vocab_size = vocab_size
        self._upload = platform.upload
        device = platform.device
        # A row per parameter, so that what a step gathers of each lies together.
        self._floats = torch.zeros(3, max_num_seqs, dtype=torch.float32, device=device)
        self._integers = torch.zeros(2, max_num_seqs, dtype=torch.int64, device=device)
        self._greedy = np.ones(max_num_seqs, dtype=bool)
        self._filtered = np.zeros(max_num_seqs, dtype=bool)

    def enter(self, rows: Sequence[NewRow]) -> None:
        """Write the parameters of requests into their slots."""
        floats, integers = [], []
        for row in rows:
            params, temperature = row.params, effective_temperature(row.params)
            greedy = temperature == 0
            top_k = params.top_k if 0 < params.top_k < self._vocab_size else 0
            floats.append([temperature, params.top_p, params.min_p])
            integers.append([row.slot, top_k, signed64(row.seed)])
            self._greedy[row.slot] = greedy
            self._filtered[row.slot] = not greedy and (top_k > 0 or params.top_p < 1 or params.min_p > 0)
        slots_R, *integers_R = self._upload(torch.tensor(integers).t().contiguous())
        self._floats[:, slots_R] = self._upload(torch.tensor(floats).t().contiguous())
        self._integers[:, slots_R] = torch.stack(integers_R)

    def is_greedy(self, slot: int) -> bool:
        """Whether the slot's request takes the most likely token."""
        return bool(self._greedy[slot])

    def gather(self, rows: SampleRows) -> SamplingTensors:
        """The parameters of a step's rows."""
        slots_S, positions_S = self._upload(torch.from_numpy(np.stack([rows.slots_S, rows.positions_S])))
        temperature_S, top_p_S, min_p_S = self._columns(self._floats, slots_S)
        top_k_S, seeds_S = self._columns(self._integers, slots_S)
        return SamplingTensors(
            temperature_S=temperature_S,
            top_k_S=top_k_S,
            top_p_S=top_p_S,
            min_p_S=min_p_S,
            seeds_S=seeds_S,
            positions_S=positions_S,
            all_greedy=bool(self._greedy[rows.slots_R].all()),
            any_filter=bool(self._filtered[rows.slots_R].any()),
        )

    @staticmethod
    def _columns(table: Tensor, slots_S: Tensor) -> tuple[Tensor, ...]:
        return table[:, slots_S].unbind(0)
