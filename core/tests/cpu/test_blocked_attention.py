"""The tiled backend against dense attention in float64, for every mix of a step and every dtype of the cache."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from dovetail.contracts.attention import AttentionSpec, StepTensors
from dovetail.contracts.ops import OpTable
from dovetail.platforms.cpu import blocked_attention
from dovetail.platforms.cpu.blocked_attention import BlockedAttention

CPU = torch.device("cpu")
PAGE = 16
LENGTHS = (1, 9, 40, 70, 333)
"""The last one spans several tiles and, with small spans, several spans."""
CHUNKS: dict[str, list[tuple[int, ...]]] = {
    "whole": [LENGTHS],
    "chunks": [(1, 4, 33, 0, 300), (0, 5, 0, 69, 32), (0, 0, 7, 1, 1)],
    "drafts": [(1, 5, 35, 66, 326), (0, 4, 5, 4, 7)],
}


def dense(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """Causal attention of one request in float64, ``[T, H × K]``."""
    q, k, v = q.double(), k.double(), v.double()
    repeat = spec.num_heads // spec.num_kv_heads
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = torch.einsum("qhk,lhk->hql", q, k) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    position = torch.arange(len(q))
    distance = position.unsqueeze(1) - position
    scores = scores.masked_fill((distance < 0) | (distance >= (spec.window or len(q))), -torch.inf)
    return torch.einsum("hql,lhk->qhk", scores.softmax(-1), v).flatten(1)


class Requests:
    """Random requests on shuffled blocks, and the steps over them."""

    def __init__(self, spec: AttentionSpec, dtype: torch.dtype) -> None:
        g = torch.Generator().manual_seed(3)
        pages = [-(-length // PAGE) for length in LENGTHS]
        ids = random.Random(1).sample(range(1, sum(pages) + 1), sum(pages))
        self.num_blocks = sum(pages) + 1
        self.tables = torch.zeros(len(LENGTHS), max(pages), dtype=torch.int32)
        for row, (first, count) in enumerate(zip(itertools.accumulate(pages, initial=0), pages, strict=False)):
            self.tables[row, :count] = torch.tensor(ids[first : first + count])
        heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        self.qkv = [[torch.randn(n, h, spec.head_size, generator=g).to(dtype) for h in heads] for n in LENGTHS]
        self.done = [0] * len(LENGTHS)

    def step(self, counts: tuple[int, ...], padding: int) -> tuple[StepTensors, list[Tensor]]:
        """The next ``counts`` tokens of each request, then padding tokens and one padding request."""
        parts = [
            [x[done : done + count] for x in qkv]
            for qkv, done, count in zip(self.qkv, self.done, counts, strict=True)
        ]
        q, k, v = (torch.cat([part[i] for part in parts] + [parts[-1][i][:1].repeat(padding, 1, 1)]) for i in range(3))
        positions = [p for d, c in zip(self.done, counts, strict=True) for p in range(d, d + c)]
        rows = [r for r, c in enumerate(counts) for _ in range(c)]
        slots = [int(self.tables[r, p // PAGE]) * PAGE + p % PAGE for r, p in zip(rows, positions, strict=True)]
        self.done = [d + c for d, c in zip(self.done, counts, strict=True)]
        starts = [*itertools.accumulate(counts, initial=0), sum(counts)]
        tables = torch.cat([self.tables, torch.zeros_like(self.tables[:1])])
        step = StepTensors(
            token_ids_T=torch.zeros(len(q), dtype=torch.int64),
            positions_T=torch.tensor([*positions, *[0] * padding]),
            query_start_R1=torch.tensor(starts, dtype=torch.int32),
            seq_lens_R=torch.tensor([*self.done, 0], dtype=torch.int32),
            block_tables=[tables],
            slot_mapping=[torch.tensor([*slots, *[0] * padding])],
            logits_rows_S=torch.zeros(0, dtype=torch.int64),
            max_query_len=max(counts),
            max_seq_len=max(self.done),
        )
        return step, [q, k, v]


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize(
    ("window", "soft_cap"), [(None, None), (7, None), (100, 3.0)], ids=["plain", "window", "window-cap"]
)
@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.bfloat16, 1e-2),
        (torch.float32, torch.float8_e4m3fn, 1e-5),
    ],
    ids=["fp32", "bf16", "fp8-kv"],
)
def test_equals_dense_attention(monkeypatch, chunks, window, soft_cap, dtype, kv_dtype, tolerance) -> None:
    monkeypatch.setattr(blocked_attention, "SPAN", 4 * PAGE)
    spec = AttentionSpec(num_heads=6, num_kv_heads=2, head_size=24, scale=0.2, window=window, soft_cap=soft_cap)
    requests = Requests(spec, dtype)
    backend = BlockedAttention(ops=OpTable(), device=CPU, dtype=dtype, kv_dtype=kv_dtype, block_size=PAGE)
    cache = backend.allocate(spec, requests.num_blocks)
    outputs: list[list[Tensor]] = [[] for _ in LENGTHS]
    for counts in CHUNKS[chunks]:
        step, qkv = requests.step(counts, padding=3)
        out = backend.forward(*qkv, cache, backend.build_metadata(step, 0), spec)
        assert out.dtype == dtype
        assert out.isfinite().all()
        for rows, part in zip(outputs, out[: sum(counts)].split(list(counts)), strict=True):
            rows.append(part)
    for rows, (q, k, v) in zip(outputs, requests.qkv, strict=True):
        expected = dense(q, k.to(kv_dtype), v.to(kv_dtype), spec)
        error = (torch.cat(rows).double() - expected).norm() / expected.norm()
        assert error < tolerance


def test_page_bytes_are_those_of_the_pages() -> None:
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=24, scale=0.2)
    backend = BlockedAttention(
        ops=OpTable(), device=CPU, dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn, block_size=8
    )
    cache = backend.allocate(spec, 5)
    assert cache.keys.nbytes + cache.values.nbytes == 5 * backend.page_bytes(spec)


def test_values_beyond_the_cache_dtype_saturate() -> None:
    """e4m3 has no infinity: without the clamp they would become NaN, for good."""
    spec = AttentionSpec(num_heads=2, num_kv_heads=2, head_size=8, scale=0.2)
    backend = BlockedAttention(
        ops=OpTable(), device=CPU, dtype=torch.float32, kv_dtype=torch.float8_e4m3fn, block_size=PAGE
    )
    requests = Requests(spec, torch.float32)
    step, (q, k, v) = requests.step(LENGTHS, padding=0)
    out = backend.forward(
        q, k * 1e4, v * 1e4, backend.allocate(spec, requests.num_blocks), backend.build_metadata(step, 0), spec
    )
    assert out.isfinite().all()
    assert out.abs().max() == pytest.approx(448, rel=1e-5)
