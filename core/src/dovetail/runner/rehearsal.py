"""Steps that nobody asked for, before the first that somebody does: what must be compiled, or measured, is met here.

Their requests are all in slot 0, which the first real one overwrites.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dovetail.config import EngineConfig
from dovetail.contracts.executor import KVGroup, Progress
from dovetail.contracts.ops import OpTable
from dovetail.errors import ConfigError
from dovetail.messages import NULL_BLOCK, NewRow, StepPlan
from dovetail.ops import reference
from dovetail.runner.draft_model import DraftRunner
from dovetail.runner.forward import ForwardPass
from dovetail.runner.sampler import Sampler
from dovetail.runner.split_step import SplitStep
from dovetail.runner.stepped import Stepper
from dovetail.sampling_params import SamplingParams

_FILTERS: dict[str, Any] = {"top_k": 50, "top_p": 0.9, "min_p": 0.01}
_RULES: dict[str, Any] = {
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "logit_bias": {0: 1.0},
}
DEMANDING = SamplingParams(**_FILTERS, **_RULES, logprobs=1)
"""Takes whatever needs memory."""
WAYS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, **_RULES, logprobs=0),
    SamplingParams(),
    SamplingParams(**_RULES),
    SamplingParams(**_FILTERS, logprobs=1),
    DEMANDING,
)
"""Through the sampler: greedy or not, filtered or not, logits of the model's dtype or changed by rules."""


def pad_largest_step(config: EngineConfig, stepper: Stepper, draft: DraftRunner | None) -> None:
    """Run a step of that size on padding, for what it launches."""
    bucket = stepper.forward.bucket(_most_tokens(config), config.max_num_seqs)
    for each in _each(stepper, draft):
        each.warm_up(bucket)


@torch.inference_mode()
def run_largest_step(
    config: EngineConfig, stepper: Stepper, draft: DraftRunner | None, groups: Sequence[KVGroup]
) -> None:
    """Run the largest step that a configuration allows, over caches that may hold the null block alone.

    Raises:
        ConfigError: the device's memory does not suffice.
    """
    plan = largest_plan(config, len(groups))
    try:
        stepper.forward.tables.apply(plan)
        stepper.enter(plan.new_rows[:1])
        stepper.run(plan).sampling.read()
        if draft is not None:
            draft.forward.warm_up(draft.forward.bucket(plan.total_tokens, len(plan.slots)))
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"A step of {plan.total_tokens} tokens of {len(plan.slots)} requests does not fit beside the weights. "
            f"Lower --max-num-batched-tokens or --max-num-seqs, quantize the weights, or free memory. ({error})"
        ) from error


def largest_plan(config: EngineConfig, num_groups: int) -> StepPlan:
    """As many requests as may run share as many tokens as a step may have; all sample, and verify drafts if there are
    any."""
    requests = config.max_num_seqs
    tokens = _most_tokens(config)
    counts = [tokens // requests + (i < tokens % requests) for i in range(requests)]
    drafts = [min(config.num_speculative_tokens, count - 1) for count in counts]
    pages = -(-counts[0] // config.block_size)
    return _plan(_row(DEMANDING, counts[0] - drafts[0], [[NULL_BLOCK] * pages] * num_groups), counts, drafts)


def _most_tokens(config: EngineConfig) -> int:
    return min(config.max_num_batched_tokens, config.max_num_seqs * config.max_model_len)


def _each(stepper: Stepper, draft: DraftRunner | None) -> list[Stepper | ForwardPass]:
    return [stepper] if draft is None else [stepper, draft.forward]


def warm_up(stepper: Stepper, draft: DraftRunner | None, ops: OpTable, progress: Progress) -> None:
    """Run every bucket on padding, and sample so many rows in every way, unless that is part of the steps."""
    buckets = [(each, bucket) for each in _each(stepper, draft) for bucket in stepper.forward.ladder]
    rows: set[int] = set()
    widest_SV: Tensor | None = None
    for done, (each, bucket) in enumerate(buckets):
        progress.update("warm-up", done, len(buckets))
        logits_SV = each.warm_up(bucket)
        if each is stepper and logits_SV is not None:
            rows |= {bucket.num_requests, max(1, bucket.num_requests - 1)}  # even and odd
            widest_SV = logits_SV if widest_SV is None or len(logits_SV) > len(widest_SV) else widest_SV
    if isinstance(stepper, SplitStep) and widest_SV is not None and ops.sample is not reference.sample:
        for count in sorted(rows):
            sample_every_way(stepper.sampler, widest_SV[:count])
    progress.update("warm-up", len(buckets), len(buckets))


@torch.inference_mode()
def sample_every_way(sampler: Sampler, logits_SV: Tensor) -> None:
    """One request per row of logits, which may hold anything."""
    for params in WAYS:
        row = _row(params, 1, [])
        sampler.enter([row])
        plan = _plan(row, [1] * len(logits_SV), [0] * len(logits_SV))
        sampler.step(plan, logits_SV).read()


def _plan(row: NewRow, counts: list[int], drafts: list[int]) -> StepPlan:
    return StepPlan(
        step=0,
        new_rows=[row],
        freed_slots=[],
        slots=[row.slot] * len(counts),
        num_computed=[0] * len(counts),
        num_scheduled=counts,
        drafts=[[0] * ahead for ahead in drafts],
        samples=[True] * len(counts),
        block_updates=[],
    )


def _row(params: SamplingParams, length: int, block_ids: list[list[int]]) -> NewRow:
    return NewRow(
        slot=0,
        request_id="rehearsal",
        token_ids=[0] * length,
        prompt_len=length,
        params=params,
        eos_token_ids=(),
        seed=0,
        block_ids=block_ids,
    )
