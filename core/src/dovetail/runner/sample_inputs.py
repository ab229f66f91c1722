"""What a step's sampling reads and gives, for platforms that compile it together with the model: tensors alone, whose
shapes depend on nothing but the bucket.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dovetail.ops.sampling import SamplingTensors
from dovetail.runner.logprobs import Scores
from dovetail.runner.verify import DraftRows


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleInputs:
    """Which rules hold for which rows.

    Attributes:
        slots_R: int64 slot of each request.
        slots_S: int64 slot of each row.
        short_S: bool: too few tokens exist for a stop.
        earlier_SK: int64 drafts before each row in its request, then ``NO_TOKEN``; no columns without speculation.
    """

    slots_R: Tensor
    slots_S: Tensor
    short_S: Tensor
    earlier_SK: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleInputs:
    """What is sampled in one step. Padding rows are greedy and belong to nobody's slot.

    Attributes:
        params: of each row. Its flags claim the most: rows of every kind, and filters.
        drafts: what is verified; None in an engine without speculation.
        rules: None if no request has one, and none asks for log-probabilities.
        targets_T: int64: the token that follows each of the step's, if log-probabilities of a prompt are wanted.
    """

    params: SamplingTensors
    drafts: DraftRows | None
    rules: RuleInputs | None
    targets_T: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleOutputs:
    """What was sampled.

    Attributes:
        tokens_S: int64: what ordinary sampling draws at each row.
        tokens_RK: int64: accepted drafts, then one more token or ``POISONED``, then ``NO_TOKEN``.
        finite_S: bool: which rows had a choice before the rules.
        scores: of each row's token.
        prompt_scores: of each token's target.
    """

    tokens_S: Tensor
    tokens_RK: Tensor
    finite_S: Tensor | None = None
    scores: Scores | None = None
    prompt_scores: Scores | None = None
