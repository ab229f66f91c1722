"""Sampling as requests may ask for it, so that its kernels are met before the first one does."""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.ops.sampling import SamplingTensors
from dovetail_cuda.kernels.logprobs import top_logprobs
from dovetail_cuda.kernels.penalties import penalize
from dovetail_cuda.kernels.sampling import sample

WAYS = ((True, False), (False, False), (False, True))
"""All rows greedy or not, any filtered or not."""


def sample_every_way(logits_SV: Tensor) -> None:
    """Launch what can follow a step with these logits: on them as they are, or changed by rules, in float32."""
    (rows, width), device = logits_SV.shape, logits_SV.device
    numbers_S = torch.zeros(rows, dtype=torch.int64, device=device)
    changed_SV = logits_SV.to(torch.float32, copy=True)
    counts_1V = torch.zeros(1, width, dtype=torch.int32, device=device)
    factors_13 = torch.ones(1, 3, device=device)
    odd_S = torch.zeros(rows + 1, dtype=torch.int64, device=device)[1:]  # where kernels are compiled for memory like it
    for slots_S in (numbers_S, odd_S):
        penalize(changed_SV, torch.arange(rows, device=device), slots_S, factors_13, counts_1V, counts_1V > 0)
    for x_SV in (logits_SV, changed_SV):
        for all_greedy, any_filter in WAYS:
            sample(x_SV, _parameters(numbers_S, all_greedy, any_filter))
    for tokens_S in (numbers_S, odd_S):
        for k in (0, 1):
            top_logprobs(logits_SV, tokens_S, k)


def _parameters(numbers_S: Tensor, all_greedy: bool, any_filter: bool) -> SamplingTensors:
    ones_S = torch.ones(len(numbers_S), device=numbers_S.device)
    return SamplingTensors(
        temperature_S=ones_S,
        top_k_S=numbers_S,
        top_p_S=ones_S,
        min_p_S=ones_S,
        seeds_S=numbers_S,
        positions_S=numbers_S,
        all_greedy=all_greedy,
        any_filter=any_filter,
    )
