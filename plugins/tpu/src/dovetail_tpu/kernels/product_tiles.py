"""How products of quantized weights are cut: a function of the chip and the layer, not of trials on one.

A weight lies as ``[O, J]``: a row per output, whose ``J`` columns hold an input each, or two where they are pairs of
4-bit values. A step of a product multiplies a tile of rows of activations with a tile of the weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dovetail.errors import ConfigError
from dovetail_tpu.kernels.chip import LANES, V5E, Chip, in_lanes

NAMED_SHARE = 0.6
"""Of vector memory, for what the kernel names. What values spill comes on top."""
VMEM_SHARE = 0.9375
"""Of vector memory, that the compiler may use."""
MOST_COLUMNS = 2048
"""Of a tile. With as many outputs as below it is 1 MiB of bytes, which arrives in about a microsecond."""
MOST_MASKED = 512
"""Of a tile whose groups are less than lanes: each takes a product of its own, and those are written out one by one."""
STEP_COLUMNS = 512
"""In the time that it takes to begin a step (a third of a microsecond), about as many columns of a tile arrive."""
MOST_OUTPUTS = 512
MOST_ROWS = 512
MOST_EXPERT_ROWS = 128
FEWEST_ROWS = 32
"""Of a tile in a grid of several: those of a register of bytes."""
FEWEST_GROUPED = 16
"""Columns of a group."""
CHUNK = 512
"""Columns that are widened at a time, so that what they become stays small."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductShape:
    """A product of one layer, on one device.

    Attributes:
        rows, outputs: of the result.
        columns: of the weight.
        group: columns that share a scale; all of them, if that is not less.
        parts: inputs in a column of the weight.
        itemsize: bytes of an activation.
        weight_itemsize: bytes of a column of a row of the weight.
        product_itemsize: bytes of a number as it enters the matrix unit.
        out_itemsize: bytes of a result.
        tile_rows: rows of a tile, if that is decided already.
    """

    rows: int
    outputs: int
    columns: int
    group: int
    parts: int = 1
    itemsize: int = 2
    weight_itemsize: int = 1
    product_itemsize: int = 2
    out_itemsize: int = 4
    tile_rows: int | None = None


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a product is cut.

    Attributes:
        rows, outputs: of a tile of the result.
        columns: of the weight that are multiplied in one step.
        vmem_bytes: that the compiler may use.
    """

    rows: int
    outputs: int
    columns: int
    vmem_bytes: int


def product_tiles(chip: Chip | None, shape: ProductShape) -> Tiles:
    """What to cut a product into.

    Rows: as many as make arithmetic take as long as the weight's way from HBM. Then whichever of rows and outputs
    takes more vector memory is halved until the tiles fit.

    Args:
        chip: None cuts as for a chip of the middle; the host has no such limits.

    Raises:
        ConfigError: not even the smallest tiles fit.
    """
    chip = chip or V5E
    rows, outputs = _rows(chip, shape), min(shape.outputs, MOST_OUTPUTS)
    tiles = Tiles(rows, outputs, columns_tile(shape.columns, shape.group), int(chip.vmem_bytes * VMEM_SHARE))
    while product_vmem(tiles, shape) > chip.vmem_bytes * NAMED_SHARE:
        tiles = _smaller(tiles, chip, shape)
    return tiles


def columns_tile(columns: int, group: int) -> int:
    """Columns per step: whole lanes and whole groups, few steps, and little beyond the last column.

    Scales are laid out by step, so this is a function of the weight alone.
    """
    unit = math.lcm(LANES, group) if group < columns else LANES
    most = MOST_MASKED if group < min(LANES, columns) else MOST_COLUMNS
    sizes = range(unit, max(unit, most) + 1, unit)
    return min(sizes, key=lambda size: -(-columns // size) * (size + STEP_COLUMNS))


def groups_by_step(columns: int, group: int) -> tuple[int, int]:
    """How many steps have scales of their own, and for how many groups each. Those after the last have none."""
    if group >= columns:
        return 1, 1
    tile = columns_tile(columns, group)
    return -(-columns // tile), tile // group


def fits_lanes(columns: int, group: int) -> bool:
    """Whether the kernel takes groups of so many columns: several to a register of lanes, or whole registers."""
    if group >= columns:
        return True
    if group < LANES:
        return LANES % group == 0 and group >= FEWEST_GROUPED
    return group % LANES == 0 and group <= MOST_COLUMNS


def sums_per_product(columns: int, group: int) -> int:
    """How many groups lie in a register of lanes. A product for each is taken, with other groups' inputs zeroed."""
    return LANES // group if group < min(LANES, columns) else 1


def product_vmem(tiles: Tiles, shape: ProductShape) -> int:
    """Bytes of vector memory, about. What is copied is buffered twice; scales are counted as whole registers."""
    groups = max(1, tiles.columns // shape.group)
    x = shape.parts * tiles.rows * tiles.columns * shape.itemsize
    weight = tiles.outputs * tiles.columns * shape.weight_itemsize
    scales = 4 * (2 * tiles.rows * in_lanes(groups) + 2 * (-(-groups // 8) * 8) * tiles.outputs)
    out = tiles.rows * in_lanes(tiles.outputs)
    wide = min(tiles.columns, CHUNK) * tiles.outputs * (4 + shape.product_itemsize)
    return 2 * (x + weight + scales + out * shape.out_itemsize) + 2 * out * 4 + wide


def expert_rows(rows: int, experts: int) -> int:
    """Of a tile, where so many rows are shared by experts: as many as one has on average, so that few stay empty."""
    return min(MOST_EXPERT_ROWS, max(FEWEST_ROWS, _power_of_two(rows / experts)))


def _rows(chip: Chip, shape: ProductShape) -> int:
    if shape.tile_rows is not None:
        return shape.tile_rows
    most = min(MOST_ROWS, max(FEWEST_ROWS, _power_of_two(chip.ridge * shape.weight_itemsize / 2)))
    return min(shape.rows, most)


def _smaller(tiles: Tiles, chip: Chip, shape: ProductShape) -> Tiles:
    has_more_rows = shape.tile_rows is None and tiles.rows > FEWEST_ROWS
    has_more_outputs = tiles.outputs > LANES
    row_bytes, output_bytes = tiles.rows * shape.parts * shape.itemsize, tiles.outputs * shape.weight_itemsize
    if has_more_rows and (row_bytes >= output_bytes or not has_more_outputs):
        return replace(tiles, rows=_half(tiles.rows, FEWEST_ROWS))
    if has_more_outputs:
        return replace(tiles, outputs=_half(tiles.outputs, LANES))
    raise ConfigError(
        f"A product with {shape.columns} columns in groups of {shape.group} takes {product_vmem(tiles, shape)} bytes of"
        f" vector memory; {chip.name} has {int(chip.vmem_bytes * NAMED_SHARE)} for it. Use a checkpoint with smaller"
        " groups."
    )


def _half(size: int, multiple: int) -> int:
    """Half of it, rounded up to a multiple."""
    return -(-(size // 2) // multiple) * multiple


def _power_of_two(number: float) -> int:
    return 1 << max(0, math.ceil(math.log2(max(number, 1))))
