"""Which of the steppers a platform's steps are run by."""

from __future__ import annotations

from collections.abc import Callable

from dovetail.config import EngineConfig
from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import Platform, ShapePolicy
from dovetail.runner.forward import ForwardPass
from dovetail.runner.sampler import Sampler
from dovetail.runner.split_step import SplitStep
from dovetail.runner.stepped import Stepper
from dovetail.runner.whole_sampler import WholeSampler
from dovetail.runner.whole_step import WholeStep


def with_sampling(
    config: EngineConfig, platform: Platform, ops: OpTable, shapes: ShapePolicy
) -> Callable[[ForwardPass], Stepper]:
    """What adds sampling to a model. Its tables are allocated once."""
    if not shapes.whole:
        sampler = Sampler(config.max_num_seqs, config.vocab_size, platform, ops)
        return lambda forward: SplitStep(forward, sampler)
    drafts, smallest = config.num_speculative_tokens, shapes.ladder()[-1]
    whole = WholeSampler(config.max_num_seqs, config.vocab_size, drafts, platform, ops, smallest)
    return lambda forward: WholeStep(platform, forward, whole)
