"""From logits to tokens: temperature, min-p, top-k, top-p, Gumbel-max. Every row is treated by itself.

Filters keep tokens at or above a threshold logit, so tokens tied with the last one kept are kept too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.ops.random import Stream, gumbel, row_keys


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingTensors:
    """Sampling parameters of a step, one entry per row of logits, on the device.

    Attributes:
        temperature_S: float32; 0 is greedy.
        top_k_S: int64; 0 keeps all.
        top_p_S, min_p_S: float32; 1 and 0 keep all.
        seeds_S: int64.
        positions_S: int64 index, in its request, of the token to choose.
        all_greedy: host knowledge: every temperature is 0.
        any_filter: host knowledge: some row that is not greedy has a top-k, top-p or min-p that drops tokens.
    """

    temperature_S: Tensor
    top_k_S: Tensor
    top_p_S: Tensor
    min_p_S: Tensor
    seeds_S: Tensor
    positions_S: Tensor
    all_greedy: bool
    any_filter: bool


def sample_tokens(logits_SV: Tensor, params: SamplingTensors) -> Tensor:
    """See :func:`dovetail.ops.reference.sample`."""
    if params.all_greedy:
        return logits_SV.argmax(-1)
    logits_SV = filter_logits(logits_SV, params)
    keys_S = row_keys(params.seeds_S, params.positions_S, Stream.SAMPLE)
    noise_SV = gumbel(keys_S, torch.arange(logits_SV.shape[1], device=logits_SV.device))
    noise_SV.masked_fill_((params.temperature_S == 0).unsqueeze(1), 0.0)
    return noise_SV.add_(logits_SV).argmax(-1)


def filter_logits(logits_SV: Tensor, params: SamplingTensors) -> Tensor:
    """Scaled logits in float32, ``-inf`` for tokens that min-p, top-k and top-p drop; greedy rows are only converted."""
    scale_S = torch.where(params.temperature_S == 0, 1.0, params.temperature_S)
    logits_SV = logits_SV.to(torch.float32) / scale_S.unsqueeze(1)
    if not params.any_filter:
        return logits_SV
    floor_S1 = logits_SV.amax(-1, keepdim=True) + params.min_p_S.log().unsqueeze(1)
    logits_SV = logits_SV.masked_fill(logits_SV < floor_S1, -torch.inf)
    sorted_SV = logits_SV.sort(-1, descending=True).values
    top_k_S1 = torch.where(params.top_k_S > 0, params.top_k_S, logits_SV.shape[1]).clamp(max=logits_SV.shape[1]).unsqueeze(1)
    floor_S1 = sorted_SV.gather(1, top_k_S1 - 1)
    sorted_SV = sorted_SV.masked_fill(sorted_SV < floor_S1, -torch.inf)
    reached_SV = sorted_SV.softmax(-1).cumsum(-1) >= params.top_p_S.unsqueeze(1)
    last_S1 = reached_SV.to(torch.int32).argmax(-1, keepdim=True)
    p_floor_S1 = torch.where(params.top_p_S.unsqueeze(1) < 1, sorted_SV.gather(1, last_S1), -torch.inf)
    floor_S1 = torch.maximum(floor_S1, p_floor_S1)
    return logits_SV.masked_fill(logits_SV < floor_S1, -torch.inf)
