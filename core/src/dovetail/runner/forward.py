"""ForwardPass: one model on one platform, from a step's plan to hidden states and logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dovetail.contracts.attention import AttentionBackend, AttentionSpec, KVCache, Metadata, StepTensors
from dovetail.contracts.executor import KVGroup
from dovetail.contracts.model import Model
from dovetail.contracts.platform import Bucket, Platform, ShapePolicy, StepFunction
from dovetail.messages import StepPlan
from dovetail.runner.bound_attention import BoundAttention
from dovetail.runner.slots import SlotTables, StepRows


class ForwardPass:
    """Gathers a step's tensors, pads them to a bucket, and runs the step that the platform compiled for it.

    Attributes:
        model: in device memory.
        tables: the requests in its slots.
        ladder: the buckets to warm up.
    """

    def __init__(
        self,
        *,
        platform: Platform,
        model: Model,
        backend: AttentionBackend,
        specs: Sequence[AttentionSpec],
        groups: Sequence[KVGroup],
        caches: Sequence[KVCache],
        tables: SlotTables,
        shapes: ShapePolicy,
        logits_per_request: int,
    ) -> None:
        self.model = model
        self.tables = tables
        self.ladder = shapes.ladder()
        self._platform = platform
        self._backend = backend
        self._specs = specs
        self._caches = caches
        self._group_of = {layer: g for g, group in enumerate(groups) for layer in group.layers}
        self._num_groups = len(groups)
        self._shapes = shapes
        self._logits_per_request = logits_per_request
        self._steps: dict[tuple[Bucket, bool], StepFunction] = {}

    def run(self, plan: StepPlan, *, whole: bool = False) -> tuple[StepRows, Tensor, Tensor]:
        """Run one step whose diffs the tables have.

        Args:
            whole: every token's hidden states are wanted; else the last layer may leave most of a prompt out. The
                two are compiled apart, this one when it is first met.

        Returns:
            The step's index arithmetic, hidden states ``[T, D]`` with padding if they are wanted, and logits
            ``[S, V]`` without.
        """
        rows, bucket, step = self.gather(plan)
        hidden_TD, logits_SV = self._compiled(bucket, whole)(step, self.metadata(step))
        return rows, hidden_TD, logits_SV[: len(rows.logits_rows_S)]

    def gather(self, plan: StepPlan) -> tuple[StepRows, Bucket, StepTensors]:
        """A step's index arithmetic, the bucket it fits, and its tensors, padded."""
        rows = StepRows.of(plan)
        bucket = self.bucket(len(rows.positions_T), len(rows.slots_R))
        step = self.tables.step_tensors(rows, bucket, self._num_logits(bucket) if self._shapes.static else None)
        return rows, bucket, step

    def padding(self, bucket: Bucket) -> StepTensors:
        """A step of padding alone."""
        return self.tables.padding_step(bucket, self._num_logits(bucket))

    def close(self) -> None:
        """Forget the steps: they refer back to this, and would keep model and cache until they are collected."""
        self._steps.clear()

    def bucket(self, num_tokens: int, num_requests: int) -> Bucket:
        """What a step of this size is padded to."""
        return self._shapes.fit(num_tokens, num_requests)

    @torch.inference_mode()
    def warm_up(self, bucket: Bucket) -> Tensor:
        """Compile and run one bucket on padding alone; returns its logits, ``[S, V]``."""
        step = self.padding(bucket)
        _, logits_SV = self._compiled(bucket, whole=False)(step, self.metadata(step))
        return logits_SV

    def _num_logits(self, bucket: Bucket) -> int:
        return min(bucket.num_tokens, bucket.num_requests * self._logits_per_request)

    def metadata(self, step: StepTensors) -> list[Metadata]:
        """What the attention backend makes of a step, for each KV group."""
        return [self._backend.build_metadata(step, group) for group in range(self._num_groups)]

    def _compiled(self, bucket: Bucket, whole: bool) -> StepFunction:
        step = self._steps.get((bucket, whole))
        if step is None:
            run = self.every if whole else self.some
            step = self._steps[bucket, whole] = self._platform.compile(run, bucket)
        return step

    def some(self, step: StepTensors, metadata: Sequence[Metadata]) -> tuple[Tensor, Tensor]:
        """What is compiled: hidden states, of the rows that need logits at least, and logits ``[S, V]``."""
        rows_S = step.logits_rows_S
        if len(rows_S) >= len(step.token_ids_T):
            return self.every(step, metadata)
        hidden_TD = self._hidden(step, metadata, rows_S)
        # A model that has no use for the hint returns every row.
        return hidden_TD, self.model.logits(hidden_TD if len(hidden_TD) == len(rows_S) else hidden_TD[rows_S])

    def every(self, step: StepTensors, metadata: Sequence[Metadata]) -> tuple[Tensor, Tensor]:
        """The same with hidden states of every token, ``[T, D]``."""
        hidden_TD = self._hidden(step, metadata, None)
        return hidden_TD, self.model.logits(hidden_TD[step.logits_rows_S])

    def _hidden(self, step: StepTensors, metadata: Sequence[Metadata], wanted_S: Tensor | None) -> Tensor:
        attend = BoundAttention(self._backend, self._caches, metadata, self._specs, self._group_of, wanted_S)
        return self.model.forward(step.token_ids_T, step.positions_T, attend)
