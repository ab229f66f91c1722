"""From logits to tokens without waiting for the device, where no row has a filter."""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.ops.random import Stream, gumbel, row_keys
from dovetail.ops.sampling import SamplingTensors, sample_tokens, scale_logits


def sample(logits_SV: Tensor, params: SamplingTensors) -> Tensor:
    """See :func:`dovetail.ops.reference.sample`. Greedy and sampled rows are computed together, by both rules."""
    if params.all_greedy or params.any_filter:
        return sample_tokens(logits_SV, params)
    keys_S = row_keys(params.seeds_S, params.positions_S, Stream.SAMPLE)
    noise_SV = gumbel(keys_S, torch.arange(logits_SV.shape[1], device=logits_SV.device))
    sampled_S = noise_SV.add_(scale_logits(logits_SV, params)).argmax(-1)
    return torch.where(params.is_greedy, logits_SV.argmax(-1), sampled_S)
