"""Requests on paged blocks, run through an attention backend, and what they must get: dense attention in float64."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice

import torch
from torch import Tensor

from dovetail.contracts.attention import AttentionBackend, AttentionSpec, KVCache, Metadata, Preparation, StepTensors
from dovetail.contracts.ops import OpTable
from dovetail.messages import NULL_BLOCK
from dovetail.testing.conformance.dense import attend

PLAIN = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, scale=0.125)
SIGNAL = 2.0
"""Queries are this much larger than keys, so that the softmax is far from uniform and a wrong key is seen."""

SPARE = 32
"""Caches have a multiple of so many blocks: backends that are compiled for sizes of caches meet few sizes."""


@dataclass(frozen=True, eq=False, slots=True)
class Request:
    """All queries, keys and values of one request, on the host in the activation dtype, and the blocks that hold it."""

    q_LHK: Tensor
    k_LNK: Tensor
    v_LNK: Tensor
    blocks: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.q_LHK)


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens ``start : end`` of a request, computed in one step. Equal bounds make a padding request."""

    request: Request
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a step's tables are laid out; nothing of this may change a result.

    Attributes:
        padding_tokens, padding_requests: appended to the step.
        padding_value: queries, keys and values of padding tokens.
        row_stride, column_stride: of the block table, as factors on the contiguous ones.
        spare_columns: of the block table, beyond the longest request; they hold ``NULL_BLOCK``.
        merged: queries, keys and values are views of one tensor, as a merged projection gives them.
        slack: how far ``max_query_len`` and ``max_seq_len`` exceed the step's largest.
        null_pages: pages of each request, from its first, whose blocks were freed.
    """

    padding_tokens: int = 0
    padding_requests: int = 0
    padding_value: float = 1.0
    row_stride: int = 1
    column_stride: int = 1
    spare_columns: int = 0
    merged: bool = True
    slack: int = 0
    null_pages: int = 0


@dataclass(kw_only=True)
class Bench:
    """One backend, and the steps it is given.

    Attributes:
        backend: made for ``dtype`` and ``block_size``.
        device: its.
        ops: what it was made with.
        fail: called with a message where rows of padding are not finite.
    """

    backend: AttentionBackend
    device: torch.device
    ops: OpTable
    dtype: torch.dtype
    block_size: int
    fail: Callable[[str], None]
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def requests(
        self, spec: AttentionSpec, lengths: Sequence[int], *, shuffled: bool = True, spread: int = 1
    ) -> tuple[list[Request], int]:
        """Requests of these lengths on blocks of their own; also how many blocks a cache has for them.

        Args:
            shuffled: blocks come in random order, else in ascending order.
            spread: only each ``spread``-th block is used.
        """
        pages = [-(-length // self.block_size) for length in lengths]
        blocks = list(range(1, 1 + spread * sum(pages), spread))
        if shuffled:
            self.random.shuffle(blocks)
        free = iter(blocks)
        made = [
            self.request(spec, length, tuple(islice(free, count)), seed)
            for seed, (length, count) in enumerate(zip(lengths, pages, strict=True))
        ]
        return made, -(-(spread * sum(pages) + 1) // SPARE) * SPARE

    def request(self, spec: AttentionSpec, length: int, blocks: tuple[int, ...], seed: int) -> Request:
        """Random queries, keys and values."""
        generator = torch.Generator().manual_seed(1000 + seed)
        shapes = [(length, heads, spec.head_size) for heads in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)]
        q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
        return Request((SIGNAL * q).to(self.dtype), k.to(self.dtype), v.to(self.dtype), blocks)

    def run(
        self,
        parts: Sequence[Part],
        cache: KVCache,
        spec: AttentionSpec,
        layout: Layout | None = None,
        preparation: Preparation | None = None,
    ) -> list[Tensor]:
        """One layer of one step; returns the rows of each part, on the host.

        Args:
            preparation: given to the backend with the projection, which it still has to prepare.
        """
        layout = layout or Layout()
        tables = self.tables(parts, layout=layout)
        metadata = self.backend.build_metadata(tables, 0)
        if preparation is None:
            return self.forward(parts, cache, metadata, spec, layout)
        qkv_TE = self.projection(parts, layout)
        out = self.backend.forward_projected(qkv_TE, tables.positions_T, preparation, cache, metadata, spec)
        return self._rows(out, parts, layout)

    def forward(
        self, parts: Sequence[Part], cache: KVCache, metadata: Metadata, spec: AttentionSpec, layout: Layout
    ) -> list[Tensor]:
        """One layer of a step whose metadata is there."""
        q_THK, k_TNK, v_TNK = self.inputs(parts, layout)
        out = self.backend.forward(q_THK, k_TNK, v_TNK, cache, metadata, spec)
        return self._rows(out, parts, layout)

    def _rows(self, out: Tensor, parts: Sequence[Part], layout: Layout) -> list[Tensor]:
        """The rows of each part; those of padding are looked at here."""
        counts = [part.end - part.start for part in parts]
        rows = list(out[: sum(counts)].cpu().split_with_sizes(counts))
        padding = out[sum(counts) :].cpu()
        if len(padding) != layout.padding_tokens or not bool(padding.isfinite().all()):
            self.fail(f"expected {layout.padding_tokens} finite rows for padding tokens, got {padding}.")
        return rows

    def inputs(self, parts: Sequence[Part], layout: Layout) -> list[Tensor]:
        """Queries, keys and values of a step, on the device."""
        made = []
        for name in ("q_LHK", "k_LNK", "v_LNK"):
            rows = torch.cat([getattr(part.request, name)[part.start : part.end] for part in parts])
            padding = torch.full((layout.padding_tokens, *rows.shape[1:]), layout.padding_value, dtype=rows.dtype)
            made.append(torch.cat([rows, padding]).to(self.device))
        if layout.merged:
            return list(torch.cat(made, dim=1).split_with_sizes([x.shape[1] for x in made], 1))
        return made

    def projection(self, parts: Sequence[Part], layout: Layout) -> Tensor:
        """Queries, keys and values side by side, as a layer's projection gives them; rows are ``row_stride`` apart."""
        qkv_TE = torch.cat(self.inputs(parts, replace(layout, merged=False)), dim=1).flatten(1)
        return qkv_TE.repeat(1, layout.row_stride)[:, : qkv_TE.shape[1]]

    def tables(self, *groups: Sequence[Part], layout: Layout) -> StepTensors:
        """A step's tables: one list of parts per KV group, which differ in their blocks alone."""
        parts = groups[0]
        starts = list(accumulate((part.end - part.start for part in parts), initial=0))
        lengths = [part.end if part.end > part.start else 0 for part in parts]
        total = starts[-1] + layout.padding_tokens
        longest = max(part.end - part.start for part in parts)
        return StepTensors(
            token_ids_T=torch.zeros(total, dtype=torch.int64, device=self.device),
            positions_T=self._positions(parts, layout),
            query_start_R1=self._ints([*starts, *[starts[-1]] * layout.padding_requests]),
            seq_lens_R=self._ints([*lengths, *[0] * layout.padding_requests]),
            block_tables=[self._block_table(group, layout) for group in groups],
            slot_mapping=[self._slot_mapping(group, layout) for group in groups],
            logits_rows_S=torch.zeros(0, dtype=torch.int64, device=self.device),
            max_query_len=longest + layout.slack,
            max_seq_len=max(lengths) + layout.slack,
        )

    def _ints(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def _positions(self, parts: Sequence[Part], layout: Layout) -> Tensor:
        positions = [position for part in parts for position in range(part.start, part.end)]
        return torch.tensor([*positions, *[0] * layout.padding_tokens], dtype=torch.int64, device=self.device)

    def _block_table(self, parts: Sequence[Part], layout: Layout) -> Tensor:
        rows, columns = len(parts) + layout.padding_requests, max(len(part.request.blocks) for part in parts)
        columns = max(1, columns) + layout.spare_columns
        shape = (rows * layout.row_stride, columns * layout.column_stride)
        wide = torch.full(shape, NULL_BLOCK, dtype=torch.int32, device=self.device)
        table = wide[:: layout.row_stride, :: layout.column_stride]
        for row, part in enumerate(parts):
            if part.end > part.start:
                pages = part.request.blocks[layout.null_pages : -(-part.end // self.block_size)]
                ids = torch.tensor(pages, dtype=torch.int32, device=self.device)
                table[row, layout.null_pages : layout.null_pages + len(pages)] = ids
        return table

    def _slot_mapping(self, parts: Sequence[Part], layout: Layout) -> Tensor:
        size = self.block_size
        slots = [
            part.request.blocks[position // size] * size + position % size
            for part in parts
            for position in range(part.start, part.end)
        ]
        padding = [NULL_BLOCK * size + i % size for i in range(layout.padding_tokens)]
        return torch.tensor([*slots, *padding], dtype=torch.int64, device=self.device)


def whole(request: Request) -> Part:
    """All tokens of a request."""
    return Part(request, 0, len(request))


def dense(request: Request, spec: AttentionSpec, kv_dtype: torch.dtype | None = None) -> Tensor:
    """Attention of a whole request in float64, ``[L, H × K]``, from keys and values as ``kv_dtype`` keeps them; as they
    are, where it is one of integers, by whose scales alone backends could keep them.
    """
    is_rounded = kv_dtype is not None and kv_dtype.is_floating_point
    k_LNK, v_LNK = (x.to(kv_dtype) if is_rounded else x for x in (request.k_LNK, request.v_LNK))
    return attend(request.q_LHK.double(), k_LNK, v_LNK, spec)


def with_values(request: Request, value: float) -> Request:
    """The same request with this value for every key and value."""
    filled = [torch.full_like(x, value) for x in (request.k_LNK, request.v_LNK)]
    return replace(request, k_LNK=filled[0], v_LNK=filled[1])
