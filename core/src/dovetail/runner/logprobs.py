"""Log-probabilities to report, from the model's own logits: before bias, penalties and temperature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import Platform
from dovetail.messages import TokenLogprobs
from dovetail.sampling_params import SamplingParams

NOT_ASKED = -1


class Scores(NamedTuple):
    """What is reported of each row; on the device until it is read.

    Attributes:
        tokens_S, logprobs_S, ranks_S: the row's token, its log-probability, and how many tokens are as likely at least.
        top_ids_SK, top_logprobs_SK: the most likely tokens, equals in order of their ids.
    """

    tokens_S: Tensor
    logprobs_S: Tensor
    ranks_S: Tensor
    top_ids_SK: Tensor
    top_logprobs_SK: Tensor

    def part(self, first: int, count: int) -> Scores:
        """Those of some rows."""
        return Scores(*(tensor[first : first + count] for tensor in self))


class Asked:
    """How many log-probabilities the requests asked for, by slot: -1 where none.

    Attributes:
        generated_S, prompt_S: beside each token generated, and beside each of the prompt.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self.generated_S = np.full(max_num_seqs, NOT_ASKED)
        self.prompt_S = np.full(max_num_seqs, NOT_ASKED)

    def enter(self, slot: int, params: SamplingParams) -> None:
        """Note what a request asks for."""
        self.generated_S[slot] = NOT_ASKED if params.logprobs is None else params.logprobs
        self.prompt_S[slot] = NOT_ASKED if params.prompt_logprobs is None else params.prompt_logprobs


def score(ops: OpTable, logits_SV: Tensor, tokens_S: Tensor, num_top: int) -> Scores:
    """Score each row's token, and its ``num_top`` most likely ones, without waiting for the device.

    Args:
        logits_SV: raw logits, any float dtype; the softmax is taken in float32.
        tokens_S: int64 token of each row.
    """
    return Scores(tokens_S, *ops.top_logprobs(logits_SV, tokens_S, min(num_top, logits_SV.shape[1])))


def reports(platform: Platform, scores: Scores, num_top: Sequence[int]) -> Callable[[], list[TokenLogprobs]]:
    """Fetch scores; what is returned waits for them and gives one report per row, each with its own ``num_top``."""
    read = platform.download(scores)
    return lambda: told(read(), num_top)


def told(scores_S: Sequence[Tensor], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """One report per row, from the columns of :class:`Scores` on the host."""
    columns = zip(*(tensor.tolist() for tensor in scores_S), num_top, strict=True)
    return [
        TokenLogprobs(token, logprob, rank, ids[:count], values[:count])
        for token, logprob, rank, ids, values, count in columns
    ]
