"""Products of rows with the weight of the expert that each belongs to.

Rows are sorted by expert, and each expert's are cut into tiles of its own, so that a tile has one weight and
:func:`dovetail_tpu.kernels.quantized_matmul.tiled_product` multiplies it like any other. Experts without rows are not
read. There are at most as many tiles as rows, and at most one per expert that is not full, which bounds their number
before the rows are known.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from dovetail_tpu.kernels.chip import Chip
from dovetail_tpu.kernels.product_tiles import expert_rows, product_tiles
from dovetail_tpu.kernels.quantized_matmul import Weight, shape_of, tiled_product


class Plan(NamedTuple):
    """Where rows lie in tiles.

    Attributes:
        experts: int32: of each tile, then the number of tiles that have rows.
        row_M: of each place in a tile, the row that lies there; any where none does.
        place_N: of each row; any where it has no expert.
        has_expert_N: whether it has one.
    """

    experts: Array
    row_M: Array
    place_N: Array
    has_expert_N: Array

    @property
    def tile(self) -> int:
        """Rows of a tile."""
        return len(self.row_M) // (len(self.experts) - 1)


def plan_groups(starts_E1: Array, rows: int, tile: int) -> Plan:
    """Cut rows into tiles.

    Args:
        starts_E1: integers ``[E + 1]``: expert e has the rows ``starts[e] : starts[e + 1]``. Others have no expert.
        rows: N.
        tile: rows of a tile.
    """
    starts_E1 = starts_E1.astype(jnp.int32)
    num_experts, count = len(starts_E1) - 1, max_tiles(rows, len(starts_E1) - 1, tile)
    tiles_E = -(-jnp.diff(starts_E1) // tile)
    ends_E = jnp.cumsum(tiles_E)
    first_E = ends_E - tiles_E

    tile_C = jnp.arange(count, dtype=jnp.int32)
    expert_C = jnp.minimum(jnp.searchsorted(ends_E, tile_C, side="right", method="compare_all"), num_experts - 1)
    row_CR = (starts_E1[expert_C] + (tile_C - first_E[expert_C]) * tile)[:, None] + jnp.arange(tile, dtype=jnp.int32)

    row_N = jnp.arange(rows, dtype=jnp.int32)
    expert_N = jnp.searchsorted(starts_E1, row_N, side="right", method="compare_all").astype(jnp.int32) - 1
    has_expert_N = (expert_N >= 0) & (expert_N < num_experts)
    expert_N = jnp.clip(expert_N, 0, num_experts - 1)
    return Plan(
        experts=jnp.append(expert_C.astype(jnp.int32), ends_E[-1]),
        row_M=jnp.clip(row_CR.reshape(-1), 0, rows - 1),
        place_N=jnp.where(has_expert_N, first_E[expert_N] * tile + row_N - starts_E1[expert_N], 0),
        has_expert_N=has_expert_N,
    )


def max_tiles(rows: int, num_experts: int, tile: int) -> int:
    """Of all ways to share so many rows."""
    return min(rows, rows // tile + num_experts)


def tiles_product(
    x_MI: Array,
    weight: Weight,
    plan: Plan,
    x_scale_MG: Array | None = None,
    *,
    out_dtype: DTypeLike,
    chip: Chip | None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Array:
    """``[M, O]`` of rows in tiles; what lies where no row does is undefined.

    Args:
        x_MI: ``[M, I]``, wide, or in the dtype of the weight.
        weight: of all experts, plain or quantized.
        plan: of the rows.
        x_scale_MG: float32 scales of quantized rows, in the groups of the weight.
        out_dtype: of the result.
        chip: None for the host.
        interpret: execute on the host, or simulate the chip's memories there.
    """
    with jax.enable_x64(False):
        tiles = product_tiles(chip, shape_of(len(x_MI), x_MI.dtype, weight, out_dtype, chip, plan.tile))
        return tiled_product(
            x_MI, weight, x_scale_MG, plan.experts, tiles, out_dtype=out_dtype, chip=chip, interpret=interpret
        )


def grouped_matmul(
    x_NI: Array,
    weight: Weight,
    starts_E1: Array,
    x_scale_NG: Array | None = None,
    *,
    out_dtype: DTypeLike,
    chip: Chip | None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Array:
    """``[N, O]`` of rows that are sorted by expert; zeros for rows without one.

    Args:
        x_NI: ``[N, I]``, wide, or in the dtype of the weight.
        weight: of all experts, plain or quantized.
        starts_E1: integers ``[E + 1]``: expert e has the rows ``starts[e] : starts[e + 1]``.
        x_scale_NG: float32 scales of quantized rows, in the groups of the weight.
        out_dtype: of the result.
        chip: None for the host.
        interpret: execute on the host, or simulate the chip's memories there.
    """
    with jax.enable_x64(False):
        rows = len(x_NI)
        if not rows:
            return jnp.zeros((0, weight.codes_EOJ.shape[1]), out_dtype)
        plan = plan_groups(starts_E1, rows, expert_rows(rows, len(weight.codes_EOJ)))
        x_scale_MG = None if x_scale_NG is None else x_scale_NG[plan.row_M]
        product = tiles_product(
            x_NI[plan.row_M], weight, plan, x_scale_MG, out_dtype=out_dtype, chip=chip, interpret=interpret
        )
        return jnp.where(plan.has_expert_N[:, None], product[plan.place_N], jnp.zeros((), out_dtype))
