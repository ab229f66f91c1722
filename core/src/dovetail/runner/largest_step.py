"""The largest step that a configuration allows, run once before the KV cache is sized: what it takes, the cache cannot
have."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dovetail.config import EngineConfig
from dovetail.contracts.executor import KVGroup
from dovetail.errors import ConfigError
from dovetail.messages import NULL_BLOCK, NewRow, StepPlan
from dovetail.runner.draft_model import DraftRunner
from dovetail.runner.forward import ForwardPass
from dovetail.runner.sampler import Sampler
from dovetail.sampling_params import SamplingParams

DEMANDING = SamplingParams(
    temperature=1.0,
    top_k=50,
    top_p=0.9,
    min_p=0.01,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    repetition_penalty=1.1,
    logit_bias={0: 1.0},
    logprobs=1,
    max_tokens=1,
)
"""Takes every way through the sampler that needs memory."""


@torch.inference_mode()
def run_largest_step(
    config: EngineConfig, forward: ForwardPass, draft: DraftRunner | None, sampler: Sampler, groups: Sequence[KVGroup]
) -> None:
    """Run it, over caches that may hold the null block alone; requests that enter a slot later replace its own.

    Raises:
        ConfigError: the device's memory does not suffice.
    """
    plan = largest_plan(config, len(groups))
    try:
        forward.tables.apply(plan)
        for row in plan.new_rows:
            sampler.enter(row)
        _, _, logits_SV = forward.run(plan)
        sampler.step(plan, logits_SV).read()
        if draft is not None:
            draft.forward.warm_up(draft.forward.ladder[0])
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"A step of {plan.total_tokens} tokens of {len(plan.slots)} requests does not fit beside the weights. "
            f"Lower --max-num-batched-tokens or --max-num-seqs, quantize the weights, or free memory. ({error})"
        ) from error


def largest_plan(config: EngineConfig, num_groups: int) -> StepPlan:
    """As many requests as may run share as many tokens as a step may have; all sample, and verify drafts if there are
    any."""
    requests = config.max_num_seqs
    tokens = min(config.max_num_batched_tokens, requests * config.max_model_len)
    counts = [tokens // requests + (slot < tokens % requests) for slot in range(requests)]
    drafts = [min(config.num_speculative_tokens, count - 1) for count in counts]
    return StepPlan(
        step=0,
        new_rows=[
            _row(slot, count - ahead, -(-count // config.block_size), num_groups)
            for slot, (count, ahead) in enumerate(zip(counts, drafts, strict=True))
        ],
        freed_slots=[],
        slots=list(range(requests)),
        num_computed=[0] * requests,
        num_scheduled=counts,
        drafts=[[0] * ahead for ahead in drafts],
        samples=[True] * requests,
        block_updates=[],
    )


def _row(slot: int, length: int, pages: int, num_groups: int) -> NewRow:
    return NewRow(
        slot=slot,
        request_id=str(slot),
        token_ids=[0] * length,
        prompt_len=length,
        params=DEMANDING,
        eos_token_ids=(),
        seed=slot,
        block_ids=[[NULL_BLOCK] * pages] * num_groups,
    )
