import dataclasses

import pytest

from dovetail.errors import ConfigError
from dovetail_tpu.kernels.chip import CHIPS, LANES, V4, V5E, V6E
from dovetail_tpu.kernels.product_tiles import (
    FEWEST_ROWS,
    MOST_COLUMNS,
    NAMED_SHARE,
    ProductShape,
    columns_tile,
    expert_rows,
    fits_lanes,
    groups_by_step,
    product_tiles,
    product_vmem,
    sums_per_product,
)

WHOLE = 1 << 20
LLAMA = ProductShape(rows=64, outputs=14336, columns=4096, group=WHOLE)
COLUMNS = (70, 128, 2048, 2500, 3584, 4096, 5120, 8192, 11008, 14336, 18944, 28672)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_tiles_fit_vector_memory(chip, columns):
    for group in (WHOLE, 16, 64, 128, 512):
        for parts, itemsize, weight in ((1, 1, 1), (1, 2, 1), (2, 2, 1), (1, 4, 4), (2, 4, 1)):
            for rows in (1, 64, 300, 4096):
                shape = ProductShape(
                    rows=rows,
                    outputs=4096,
                    columns=columns,
                    group=group,
                    parts=parts,
                    itemsize=itemsize,
                    weight_itemsize=weight,
                    product_itemsize=max(itemsize, 2),
                )
                tiles = product_tiles(chip, shape)
                assert product_vmem(tiles, shape) <= chip.vmem_bytes * NAMED_SHARE
                assert tiles.columns % LANES == 0
                assert tiles.columns <= MOST_COLUMNS
                assert group >= columns or tiles.columns % group == 0
                assert tiles.outputs % LANES == 0
                assert tiles.rows == rows or tiles.rows % FEWEST_ROWS == 0


@pytest.mark.parametrize("columns", COLUMNS)
def test_little_is_multiplied_in_vain(columns):
    for group in (WHOLE, 128):
        tile = columns_tile(columns, group)
        steps = -(-columns // tile)
        assert steps * tile <= max(1.12 * columns, columns + LANES)
        assert steps <= -(-columns // 1024)


def test_rows_are_as_many_as_make_arithmetic_take_as_long_as_the_weight():
    prompt = dataclasses.replace(LLAMA, rows=4096)
    assert [product_tiles(chip, prompt).rows for chip in (V4, V5E, V6E)] == [128, 128, 512]
    assert product_tiles(V5E, LLAMA).rows == 64


def test_small_vector_memory_takes_smaller_tiles():
    shape = dataclasses.replace(LLAMA, rows=4096, itemsize=4, weight_itemsize=4, product_itemsize=4)
    small, large = product_tiles(V4, shape), product_tiles(V5E, shape)
    assert (small.rows, small.outputs) < (large.rows, large.outputs)


def test_experts_have_tiles_of_their_average():
    assert [expert_rows(rows, 8) for rows in (2, 256, 300, 512, 9999)] == [32, 32, 64, 64, 128]
    assert product_tiles(V5E, dataclasses.replace(LLAMA, tile_rows=96)).rows == 96


def test_too_little_vector_memory_is_refused():
    tiny = dataclasses.replace(V4, vmem_bytes=1 << 18)
    with pytest.raises(ConfigError, match=r"4096 columns in groups of .* v4 has 157286 for it.*smaller groups"):
        product_tiles(tiny, dataclasses.replace(LLAMA, group=2048))


@pytest.mark.parametrize(
    ("group", "fits", "sums", "by_step"),
    [
        (8, False, 16, None),
        (16, True, 8, (8, 32)),
        (24, False, None, None),
        (64, True, 2, (8, 8)),
        (128, True, 1, (2, 16)),
        (192, False, None, None),
        (512, True, 1, (2, 4)),
        (4096, True, 1, (1, 1)),
        (9000, True, 1, (1, 1)),
    ],
)
def test_groups(group, fits, sums, by_step):
    assert fits_lanes(4096, group) == fits
    assert sums is None or sums_per_product(4096, group) == sums
    assert by_step is None or groups_by_step(4096, group) == by_step


def test_groups_larger_than_a_step_do_not_fit():
    assert not fits_lanes(3 * 4096, 4096)
