"""A ragged batch of a few tokens that has everything in it which attention must get right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.contracts.attention import AttentionSpec, Preparation, StepTensors
from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import ShapePolicy
from dovetail.layers.rotary import frequencies, rotary_table
from dovetail.ops import reference

KINDS = ("a later chunk of a prompt", "a decode", "drafts to verify", "a whole prompt")


@dataclass(frozen=True, slots=True)
class TinyStep:
    """One step: which requests compute which of their tokens.

    Attributes:
        requests: row in the batch's block table.
        done, counts: tokens stored before, and tokens of this step.
        slots_T: where each token is stored.
        judged: whether its output is compared, or only its keys and values matter.
    """

    requests: list[int]
    done: list[int]
    counts: list[int]
    slots_T: Tensor
    judged: bool

    @property
    def num_tokens(self) -> int:
        """Of all requests."""
        return sum(self.counts)

    @property
    def positions(self) -> Tensor:
        """int64: of each token in its request."""
        spans = zip(self.done, self.counts, strict=True)
        return torch.tensor([position for done, count in spans for position in range(done, done + count)])

    @property
    def starts(self) -> Tensor:
        """int32 ``[R + 1]``: first token of each request, and the total."""
        return torch.tensor([0, *self.counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    @property
    def lengths(self) -> Tensor:
        """int32 ``[R]``: tokens of each request after the step."""
        return torch.tensor(self.done, dtype=torch.int32) + torch.tensor(self.counts, dtype=torch.int32)

    def label(self, token: int) -> str:
        """What the request of a token is there for."""
        row = int(torch.searchsorted(self.starts, token, right=True)) - 1
        return KINDS[self.requests[row]]


class TinyBatch:
    """Four requests, each of another kind, within the limits of one engine.

    Args:
        max_requests, max_tokens, max_len: the engine's limits per step, per step and per request.
        num_groups: KV groups; all share the same tables.
        kv_dtype: that the cache stores.
    """

    def __init__(
        self,
        *,
        block_size: int,
        max_requests: int,
        max_tokens: int,
        max_len: int,
        num_groups: int,
        device: torch.device,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
    ) -> None:
        self._block_size = block_size
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._width = -(-max_len // block_size)
        self._num_groups = num_groups
        self._device = device
        self.dtype = dtype
        self.kv_dtype = kv_dtype
        counts = [min(count, max_tokens, max_len) for count in (5, 1, 4, 7)]
        drafted = min(max(block_size - 2, 0), 30)  # drafts cross into the next page, unless that is far away
        wanted = (block_size + 3, 6, drafted, 0)
        self._done = [min(done, max_len - count) for done, count in zip(wanted, counts, strict=True)]
        self._counts = counts
        pages = [-(-(done + count) // block_size) for done, count in zip(self._done, counts, strict=True)]
        self.num_blocks = sum(pages) + 1
        self.table_RB = torch.zeros((len(pages), max(pages)), dtype=torch.int32)
        free = iter(range(self.num_blocks - 1, 0, -1))  # descending, so that pages do not lie in order
        for row, count in enumerate(pages):
            self.table_RB[row, :count] = torch.tensor([next(free) for _ in range(count)])

    def steps(self) -> Iterator[TinyStep]:
        """What is in the cache already, in chunks that fit; then the tokens that count."""
        contexts = [(r, start, min(self._max_tokens, done - start)) for r, done in enumerate(self._done)
                    for start in range(0, done, self._max_tokens)]  # fmt: skip
        queries = [(r, done, count) for r, (done, count) in enumerate(zip(self._done, self._counts, strict=True))]
        for pieces, judged in ((contexts, False), (queries, True)):
            for group in self._grouped(pieces):
                yield self._step(group, judged)

    def inputs(self, spec: AttentionSpec, step: TinyStep) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values in float32, with values that the dtypes can hold; the same for the same step."""
        generator = torch.Generator().manual_seed(step.num_tokens + step.judged)
        heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        q, k, v = (torch.randn((step.num_tokens, n, spec.head_size), generator=generator) for n in heads)
        q, k, v = (x.to(self.dtype).float() for x in (q, k, v))
        return q, k, v

    def reference_cache(self, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """Zeroed keys and values for the reference operations."""
        shape = (self.num_blocks, self._block_size, spec.num_kv_heads, spec.head_size)
        return torch.zeros(shape), torch.zeros(shape)

    def stored(self, x_TNK: Tensor) -> Tensor:
        """Keys or values as the cache's dtype holds them, in float32; as they are, where that is up to scales."""
        return x_TNK.to(self.kv_dtype).float() if self.kv_dtype.is_floating_point else x_TNK

    def rotation(self, head_size: int) -> Preparation:
        """A layer that turns whole heads."""
        return Preparation(cos_sin_PK=self._angles(head_size).to(self._device), ops=OpTable())

    def turned(self, step: TinyStep, x_THK: Tensor) -> Tensor:
        """Queries or keys by the reference's rotation, with values that the dtypes can hold."""
        turned_THK, _ = reference.rotary(x_THK, x_THK, step.positions, self._angles(x_THK.shape[2]))
        return turned_THK.to(self.dtype).float()

    def _angles(self, head_size: int) -> Tensor:
        longest = max(done + count for done, count in zip(self._done, self._counts, strict=True))
        return rotary_table(frequencies(head_size // 2 * 2, 100.0), longest, torch.device("cpu"))

    def on_device(self, x_THK: Tensor, padding: int) -> Tensor:
        """The engine's form of an input, with rows of padding."""
        return torch.cat([x_THK, x_THK.new_zeros((padding, *x_THK.shape[1:]))]).to(self._device, self.dtype)

    def tensors(self, step: TinyStep, shapes: ShapePolicy) -> StepTensors:
        """The step's tables, padded to the platform's shapes."""
        tokens, requests = shapes.fit(step.num_tokens, len(step.requests))
        table_RB = torch.zeros((requests, self._width if shapes.static else self.table_RB.shape[1]), dtype=torch.int32)
        table_RB[: len(step.requests), : self.table_RB.shape[1]] = self.table_RB[step.requests]
        starts = _padded(step.starts, requests + 1, step.num_tokens)
        positions_T = _padded(step.positions, tokens, 0).to(self._device)
        return StepTensors(
            token_ids_T=torch.zeros_like(positions_T),
            positions_T=positions_T,
            query_start_R1=starts.to(self._device),
            seq_lens_R=_padded(step.lengths, requests, 0).to(self._device),
            block_tables=[table_RB.to(self._device)] * self._num_groups,
            slot_mapping=[_padded(step.slots_T, tokens, 0).to(self._device)] * self._num_groups,
            logits_rows_S=torch.zeros(requests, dtype=torch.int64, device=self._device),
            max_query_len=max(step.counts),
            max_seq_len=int(step.lengths.max()),
        )

    def tolerance(self, by_dtype: Mapping[torch.dtype, float], narrow: float) -> float:
        """Largest error allowed: that of the coarser of the two dtypes."""
        return max(by_dtype.get(dtype, narrow) for dtype in (self.dtype, self.kv_dtype))

    def _grouped(self, pieces: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
        """As many pieces per step as its limits allow, one of each request."""
        group: list[tuple[int, int, int]] = []
        for piece in pieces:
            tokens = piece[2] + sum(count for _, _, count in group)
            crowded = len(group) == self._max_requests or tokens > self._max_tokens
            if group and (crowded or piece[0] == group[-1][0]):
                yield group
                group = []
            group.append(piece)
        if group:
            yield group

    def _step(self, group: list[tuple[int, int, int]], judged: bool) -> TinyStep:
        requests, done, counts = (list(column) for column in zip(*group, strict=True))
        slots = [
            int(self.table_RB[r, p // self._block_size]) * self._block_size + p % self._block_size
            for r, first, count in group
            for p in range(first, first + count)
        ]
        return TinyStep(requests, done, counts, torch.tensor(slots), judged)


def _padded(values: Tensor, size: int, fill: int) -> Tensor:
    return torch.cat([values, values.new_full((size - len(values),), fill)])
