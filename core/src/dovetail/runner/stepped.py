"""What one run of the model with sampling gives, and which tokens of prompts it scores on the way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dovetail.contracts.platform import Bucket
from dovetail.messages import NewRow, StepPlan, TokenLogprobs
from dovetail.runner.forward import ForwardPass
from dovetail.runner.sampler import Sampling
from dovetail.runner.slots import StepRows
from dovetail.runner.verify import DraftProbs

PROMPT_LOGPROBS_CHUNK = 256
"""Rows of logits that are in memory at a time for prompt log-probabilities."""


class PromptChunk(NamedTuple):
    """Tokens of a prompt that a step predicts, and whose log-probabilities are wanted.

    Attributes:
        column: of the plan.
        slot: of the request.
        row: of the step's tokens: the first that predicts one.
        length: how many there are.
        target: position of the first that is predicted.
    """

    column: int
    slot: int
    row: int
    length: int
    target: int


PromptScores = Callable[[], Mapping[int, list[TokenLogprobs]]]
"""Waits for log-probabilities of prompts, by column."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """A step that is under way."""

    rows: StepRows
    sampling: Sampling
    prompt_scores: PromptScores


class Stepper(ABC):
    """Runs the model and samples: two programs or one, as the platform likes.

    Attributes:
        forward: the model.
    """

    forward: ForwardPass

    @abstractmethod
    def enter(self, rows: Sequence[NewRow]) -> None:
        """Requests replace those before them in their slots. Their parameters name tokens of the vocabulary only."""

    @abstractmethod
    def run(
        self, plan: StepPlan, chunks: Sequence[PromptChunk] = (), draft_probs: DraftProbs | None = None
    ) -> Stepped:
        """Queue one step whose diffs the tables have."""

    @abstractmethod
    def warm_up(self, bucket: Bucket) -> Tensor | None:
        """Compile and run one bucket on padding alone.

        Returns:
            Its logits ``[S, V]``, if sampling has to be warmed up by itself.
        """

    def close(self) -> None:
        """Forget what was compiled."""
        self.forward.close()
