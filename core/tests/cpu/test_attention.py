"""What the paged kernel does beyond the conformance suite: the same bits in other batches, chunks and threads."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dovetail.contracts.attention import AttentionSpec
from dovetail.contracts.ops import OpTable
from dovetail.errors import ConfigError
from dovetail.platforms.cpu.attention import CpuAttention
from dovetail.platforms.cpu.kernels import Kernels
from dovetail.testing.conformance.paged_batch import Bench, Layout, Part, whole

CPU = torch.device("cpu")
SPEC = AttentionSpec(num_heads=6, num_kv_heads=2, head_size=64, scale=0.125)


def backend(dtype: torch.dtype, block_size: int = 16) -> CpuAttention:
    return CpuAttention(ops=OpTable(), device=CPU, dtype=dtype, kv_dtype=dtype, block_size=block_size)


def bench(dtype: torch.dtype, block_size: int = 16) -> Bench:
    return Bench(
        backend=backend(dtype, block_size),
        device=CPU,
        ops=OpTable(),
        dtype=dtype,
        block_size=block_size,
        fail=pytest.fail,
    )


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
def test_a_request_gets_the_same_bits_in_any_batch_and_chunking(
    native: Kernels, dtype: torch.dtype, spec: AttentionSpec
) -> None:
    length = 85
    tried = bench(dtype, 32)
    requests, num_blocks = tried.requests(spec, (length, 33, 110))

    def run(chunks: list[int], batch: bool, threads: int) -> Tensor:
        native.set_threads(threads)
        cache = tried.backend.allocate(spec, num_blocks)
        others = [whole(request) for request in requests[1:]] if batch else []
        layout = Layout(padding_tokens=3 * batch, padding_requests=3 * batch)
        bounds = itertools.pairwise(itertools.accumulate(chunks, initial=0))
        return torch.cat(
            [tried.run([*others, Part(requests[0], a, b)], cache, spec, layout)[-1] for a, b in bounds]
        )

    alone = run([length], False, 1)
    assert torch.equal(run([1] * length, False, 1), alone)
    assert torch.equal(run([5, 60, 1, 19], True, 2), alone)
    assert torch.equal(run([30, 34, 21], True, 3), alone)


def test_block_size_does_not_change_bits(native: Kernels, dtype: torch.dtype) -> None:
    outs = []
    for block_size in (16, 32, 112):
        tried = bench(dtype, block_size)
        (request,), num_blocks = tried.requests(SPEC, (300,))
        outs += tried.run([whole(request)], tried.backend.allocate(SPEC, num_blocks), SPEC)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


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
