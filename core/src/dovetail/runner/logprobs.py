"""Log-probabilities to report, from the model's own logits: before bias, penalties and temperature."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dovetail.messages import TokenLogprobs


def token_logprobs(logits_SV: Tensor, tokens_S: Tensor, num_top: Sequence[int]) -> list[TokenLogprobs]:
    """One report per row: its token, and its ``num_top`` most likely tokens; equals in order of their ids.

    Args:
        logits_SV: raw logits, any float dtype; the softmax is taken in float32.
        tokens_S: int64 token of each row.
        num_top: how many tokens to report for each row.
    """
    logprobs_SV = logits_SV.to(torch.float32).log_softmax(-1)
    chosen_S1 = logprobs_SV.gather(1, tokens_S.unsqueeze(1))
    ranks = ((logprobs_SV > chosen_S1).sum(-1) + 1).tolist()
    top_ids_SK = _top_ids(logprobs_SV, min(max(num_top, default=0), logits_SV.shape[1]))
    top_logprobs = logprobs_SV.gather(1, top_ids_SK).tolist()
    tokens, chosen = tokens_S.tolist(), chosen_S1.squeeze(1).tolist()
    columns = zip(tokens, chosen, ranks, top_ids_SK.tolist(), top_logprobs, num_top, strict=True)
    return [
        TokenLogprobs(token, logprob, rank, ids[:count], values[:count])
        for token, logprob, rank, ids, values, count in columns
    ]


def _top_ids(logprobs_SV: Tensor, count: int) -> Tensor:
    """The ids of the largest entries, equals by ascending id: the float's bits, then the id, in one integer
    key.

    Log-probabilities are at most 0, and the bits of negative floats, read as an integer, grow with their
    magnitude.
    """
    magnitude_SV = (-logprobs_SV).clamp_(min=0).view(torch.int32).to(torch.int64)
    ids_V = torch.arange(logprobs_SV.shape[1], device=logprobs_SV.device)
    return (magnitude_SV << 32).add_(ids_V).topk(count, largest=False).indices
