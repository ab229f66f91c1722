import itertools
from dataclasses import replace

import pytest

from dovetail.errors import ConfigError
from dovetail_tpu.kernels.block_sizes import AttentionShape, Case, attention_blocks, attention_vmem
from dovetail_tpu.kernels.chip import CHIPS, V4, V5E, V6E, chip_of_kind, in_lanes

LLAMA = AttentionShape(tokens=2048, requests=64, columns=256, page=32, heads=32, kv_heads=8, size=128)
SHAPES = [
    AttentionShape(
        tokens=tokens,
        requests=16,
        columns=columns,
        page=page,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        size=size,
        itemsize=itemsize,
        kv_itemsize=kv_itemsize,
    )
    for (kv_heads, group, size), (tokens, columns, page), (itemsize, kv_itemsize) in itertools.product(
        [(1, 8, 128), (2, 7, 64), (3, 5, 96), (8, 4, 128), (16, 1, 256), (32, 1, 128)],
        [(1, 1, 16), (16, 100, 16), (512, 64, 64), (8192, 4096 // 24, 24)],
        [(2, 2), (2, 1), (4, 4)],
    )
]


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("case", Case)
def test_every_shape_fits(chip, case):
    for shape in SHAPES:
        blocks = attention_blocks(chip, case, shape)
        assert sum(attention_vmem(blocks, shape)) <= 0.6 * chip.vmem_bytes < blocks.vmem_bytes < chip.vmem_bytes
        assert blocks.pages % blocks.chunk == 0
        assert blocks.queries * shape.group * shape.itemsize % 32 == 0
        assert blocks.queries <= max(16, 2 * shape.tokens)
        assert blocks.pages <= 2 * shape.columns
        assert blocks.cores == chip.cores


def test_decodes_take_few_rows_and_prompts_enough_to_be_bound_by_arithmetic():
    queries = {case: attention_blocks(V5E, case, LLAMA).queries for case in Case}
    assert queries == {Case.DECODE: 4, Case.MIXED: 32, Case.PREFILL: 64}
    assert queries[Case.PREFILL] * LLAMA.group > V5E.ridge  # operations per byte of 2-byte keys and values


def test_copies_last_as_long_as_their_latency():
    for chip, keys in ((V5E, 512), (V6E, 1024)):
        blocks = attention_blocks(chip, Case.DECODE, LLAMA)
        assert blocks.pages * LLAMA.page == keys
        assert 1e-6 < keys * 2 * 8 * 128 * 2 / chip.hbm_bandwidth < 4e-6
        assert blocks.chunk * LLAMA.page == 256


def test_small_vector_memory_takes_smaller_blocks():
    small, large = (attention_blocks(chip, Case.PREFILL, replace(LLAMA, kv_heads=32)) for chip in (V4, V5E))
    assert (small.pages, small.queries) < (large.pages, large.queries)


def test_large_block_tables_are_refused():
    with pytest.raises(ConfigError, match=r"256 requests × 1024 blocks take 1048576 bytes .* v5e has 524288 .*--block"):
        attention_blocks(V5E, Case.DECODE, replace(LLAMA, requests=256, columns=1024))


def test_too_little_vector_memory_is_refused():
    with pytest.raises(ConfigError, match=r"64 key/value heads of 512 elements.*v4 has 10066329 for it"):
        attention_blocks(V4, Case.DECODE, replace(LLAMA, heads=64, kv_heads=64, size=512, page=128))


def test_chips_by_kind():
    assert {chip_of_kind(chip.kind) for chip in CHIPS.values()} == set(CHIPS.values())
    assert chip_of_kind("cpu") is None


def test_lanes():
    assert [in_lanes(size) for size in (1, 64, 128, 129, 256)] == [128, 128, 128, 256, 256]
