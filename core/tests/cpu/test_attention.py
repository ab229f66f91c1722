"""The paged kernel against dense attention in float64, and against itself in other batches, chunks and threads."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from dovetail.contracts.attention import AttentionSpec, StepTensors
from dovetail.contracts.ops import OpTable
from dovetail.errors import ConfigError
from dovetail.platforms.cpu.attention import CpuAttention, CpuCache
from dovetail.platforms.cpu.kernels import Kernels

CPU = torch.device("cpu")
SPEC = AttentionSpec(num_heads=6, num_kv_heads=2, head_size=64, scale=0.125)


def backend(dtype: torch.dtype, block_size: int = 16) -> CpuAttention:
    return CpuAttention(ops=OpTable(), device=CPU, dtype=dtype, kv_dtype=dtype, block_size=block_size)


@dataclass
class Sequence:
    """One request's queries, keys and values, and the blocks that hold it."""

    q: Tensor
    k: Tensor
    v: Tensor
    blocks: list[int]


def sequence(spec: AttentionSpec, length: int, dtype: torch.dtype, blocks: list[int], seed: int) -> Sequence:
    g = torch.Generator().manual_seed(seed)

    def heads(count: int) -> Tensor:
        return torch.randn(length, count, spec.head_size, generator=g).to(dtype)

    return Sequence(2 * heads(spec.num_heads), heads(spec.num_kv_heads), heads(spec.num_kv_heads), blocks)


def sequences(
    spec: AttentionSpec, lengths: list[int], dtype: torch.dtype, block_size: int
) -> tuple[list[Sequence], int]:
    """Requests on shuffled blocks; also how many blocks there are."""
    counts = [-(-length // block_size) for length in lengths]
    ids = list(range(1, sum(counts) + 1))
    random.Random(0).shuffle(ids)
    free = iter(ids)
    return [
        sequence(spec, length, dtype, list(itertools.islice(free, count)), seed)
        for seed, (length, count) in enumerate(zip(lengths, counts, strict=True))
    ], len(ids) + 1


def step(
    attention: CpuAttention,
    cache: CpuCache,
    spec: AttentionSpec,
    block_size: int,
    parts: list[tuple[Sequence, int, int]],
    padding: int = 0,
    fused: bool = False,
) -> list[Tensor]:
    """Run tokens ``start : end`` of each sequence in one step; returns each part's rows."""
    q, k, v = (torch.cat([getattr(s, name)[a:b] for s, a, b in parts]) for name in "qkv")
    if fused:  # views of one tensor, as a merged projection gives them
        merged = torch.cat([q, k, v], dim=1)
        q, k, v = merged.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
    starts = list(itertools.accumulate((b - a for _, a, b in parts), initial=0))
    width = max(len(s.blocks) for s, _, _ in parts)
    table = torch.zeros(len(parts), width, dtype=torch.int32)
    mapping = []
    for r, (s, a, b) in enumerate(parts):
        table[r, : len(s.blocks)] = torch.tensor(s.blocks, dtype=torch.int32)
        mapping += [s.blocks[p // block_size] * block_size + p % block_size for p in range(a, b)]
    if padding:
        q, k, v = (torch.cat([x, x.new_zeros(padding, *x.shape[1:])]) for x in (q, k, v))
        starts += [starts[-1]] * padding
        table = torch.cat([table, table.new_zeros(padding, width)])
        mapping += [0] * padding
    tensors = StepTensors(
        token_ids_T=torch.zeros(len(mapping), dtype=torch.int64),
        positions_T=torch.zeros(len(mapping), dtype=torch.int64),
        query_start_R1=torch.tensor(starts, dtype=torch.int32),
        seq_lens_R=torch.tensor([b for _, _, b in parts] + [0] * padding, dtype=torch.int32),
        block_tables=[table],
        slot_mapping=[torch.tensor(mapping, dtype=torch.int64)],
        logits_rows_S=torch.zeros(0, dtype=torch.int64),
        max_query_len=0,
        max_seq_len=0,
    )
    out = attention.forward(q, k, v, cache, attention.build_metadata(tensors, 0), spec)
    assert bool(out.isfinite().all())
    return list(out[: starts[len(parts)]].split([b - a for _, a, b in parts]))


def dense(s: Sequence, spec: AttentionSpec) -> Tensor:
    """Attention of a whole sequence in float64, ``[L, H × K]``."""
    q, k, v = s.q.double(), s.k.double(), s.v.double()
    group = spec.num_heads // spec.num_kv_heads
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    distance = torch.arange(len(q)).unsqueeze(1) - torch.arange(len(q))
    hidden = (distance < 0) | (distance >= (spec.window or len(q)))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).flatten(1)


def check(actual: Tensor, expected: Tensor, dtype: torch.dtype, looser: float = 1) -> None:
    # bf16: weights and result are rounded to 8 bits each; fp32: sums of some hundred products
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error < looser * tolerance, float(error)


SHAPES = [
    SPEC,
    replace(SPEC, num_heads=4, num_kv_heads=4, head_size=32, window=50),
    replace(SPEC, num_heads=12, num_kv_heads=4, soft_cap=5.0),
    replace(SPEC, num_heads=8, num_kv_heads=1, head_size=128, window=40),
    replace(SPEC, num_heads=4, num_kv_heads=2, head_size=256, window=7, soft_cap=30.0),
    replace(SPEC, num_heads=2, num_kv_heads=1, head_size=80),
    replace(SPEC, num_heads=2, num_kv_heads=2, head_size=21, window=3),
    replace(SPEC, num_heads=53, num_kv_heads=1, head_size=16),
]


@pytest.mark.parametrize("spec", SHAPES, ids=str)
def test_ragged_batches_agree_with_dense_attention(native: Kernels, dtype: torch.dtype, spec: AttentionSpec) -> None:
    block_size = 16 * (1 + SHAPES.index(spec) % 4)
    lengths = [1, 17, 64, 65, 193]
    parts, num_blocks = sequences(spec, lengths, dtype, block_size)
    attention = backend(dtype, block_size)
    cache = attention.allocate(spec, num_blocks)
    rows: list[list[Tensor]] = [[] for _ in parts]
    done = [0] * len(parts)
    random_chunk = random.Random(1)
    while any(d < len(s.q) for d, s in zip(done, parts, strict=True)):
        chosen = [i for i, s in enumerate(parts) if done[i] < len(s.q)]
        ends = {i: min(len(parts[i].q), done[i] + random_chunk.choice([1, 3, 20, 90])) for i in chosen}
        batch = [(parts[i], done[i], ends[i]) for i in chosen]
        for i, out in zip(chosen, step(attention, cache, spec, block_size, batch, fused=True), strict=True):
            rows[i].append(out)
            done[i] = ends[i]
    for s, outs in zip(parts, rows, strict=True):
        check(torch.cat(outs), dense(s, spec), dtype)


@pytest.mark.parametrize("spec", SHAPES, ids=str)
def test_a_request_gets_the_same_bits_in_any_batch_and_chunking(
    native: Kernels, dtype: torch.dtype, spec: AttentionSpec
) -> None:
    block_size, length = 32, 85
    parts, num_blocks = sequences(spec, [length, 33, 110], dtype, block_size)
    attention = backend(dtype, block_size)

    def run(chunks: list[int], batch: bool, threads: int) -> Tensor:
        native.set_threads(threads)
        cache = attention.allocate(spec, num_blocks)
        bounds = list(itertools.accumulate(chunks, initial=0))
        others = [(s, 0, len(s.q)) for s in parts[1:]] if batch else []
        outs = [
            step(attention, cache, spec, block_size, [*others, (parts[0], a, b)], padding=3 * batch)[-1]
            for a, b in itertools.pairwise(bounds)
        ]
        return torch.cat(outs)

    whole = run([length], False, 1)
    assert torch.equal(run([1] * length, False, 1), whole)
    assert torch.equal(run([5, 60, 1, 19], True, 2), whole)
    assert torch.equal(run([30, 34, 21], True, 3), whole)


def test_block_size_does_not_change_bits(native: Kernels, dtype: torch.dtype) -> None:
    outs = []
    for block_size in (16, 32, 112):
        parts, num_blocks = sequences(SPEC, [300], dtype, block_size)
        attention = backend(dtype, block_size)
        outs += step(attention, attention.allocate(SPEC, num_blocks), SPEC, block_size, [(parts[0], 0, 300)])
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_what_a_former_owner_left_in_a_block_is_never_seen(native: Kernels, dtype: torch.dtype) -> None:
    parts, num_blocks = sequences(SPEC, [23], dtype, 16)
    attention = backend(dtype)
    cache = attention.allocate(SPEC, num_blocks)
    for pages in (cache.keys, cache.values):
        pages.fill_(0xFF)  # every element is NaN
    outs = [step(attention, cache, SPEC, 16, [(parts[0], t, t + 1)])[0] for t in range(23)]
    check(torch.cat(outs), dense(parts[0], SPEC), dtype)


def test_large_scores_do_not_overflow(native: Kernels, dtype: torch.dtype) -> None:
    parts, num_blocks = sequences(SPEC, [90], dtype, 16)
    parts[0].q *= 100
    attention = backend(dtype)
    out = step(attention, attention.allocate(SPEC, num_blocks), SPEC, 16, [(parts[0], 0, 90)])[0]
    check(out, dense(parts[0], SPEC), dtype, looser=20)  # a score of 2000 has 1e-4 of rounding error


def test_page_bytes_count_keys_and_values_of_padded_heads(native: Kernels) -> None:
    assert backend(torch.bfloat16, 32).page_bytes(SPEC) == 2 * 32 * 2 * 64 * 2
    assert backend(torch.float32).page_bytes(replace(SPEC, head_size=20)) == 2 * 16 * 2 * 32 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": torch.device("meta")}, "not meta"),
        ({"dtype": torch.float16, "kv_dtype": torch.float16}, "not torch.float16"),
        ({"kv_dtype": torch.bfloat16}, "leave --kv-cache-dtype at auto"),
        ({"block_size": 24}, "--block-size is 24"),
    ],
)
def test_what_it_cannot_do_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {"ops": OpTable(), "device": CPU, "dtype": torch.float32, "kv_dtype": torch.float32, "block_size": 16}
    with pytest.raises(ConfigError, match=message):
        CpuAttention(**arguments | change)  # type: ignore[arg-type]


def test_heads_beyond_the_kernels_limit_are_refused() -> None:
    with pytest.raises(ConfigError, match="528 elements"):
        backend(torch.float32).page_bytes(replace(SPEC, head_size=528))
