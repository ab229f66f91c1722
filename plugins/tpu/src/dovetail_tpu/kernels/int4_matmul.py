"""Products with weights of 4 bits, ``(value - zero) × scale`` with a scale and a zero point per output and group.

Two inputs share a byte, the first in its low half. They are not put side by side again: the inputs of all low halves
are multiplied with low halves, and those of all high halves with high halves. A zero point is subtracted from a group's
sum, as often as its inputs add up to.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from dovetail_tpu.kernels.chip import V5E, Chip
from dovetail_tpu.kernels.product_tiles import fits_lanes, sums_per_product
from dovetail_tpu.kernels.quantized_matmul import Weight, quantized_matmul, scales_by_step

WIDENED_BYTES = 4.5
"""Of traffic per weight, if weights are widened to bfloat16 in HBM: half is read, two are written, and two are read."""


def int4_matmul(
    x_TI: Array,
    pairs_OJ: Array,
    scale_OG: Array,
    zero_OG: Array | None,
    *,
    group: int,
    chip: Chip | None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Array:
    """``x @ ((value - zero) × scale)ᵀ``: ``[T, O]`` in the dtype of ``x``, which is wide.

    Args:
        x_TI: ``[T, I]``.
        pairs_OJ: uint8 ``[O, I / 2]``: input ``2 j`` in the low half of byte ``j``, ``2 j + 1`` in the high one.
        scale_OG, zero_OG: of each group; zero points in units of the values, None means 8 everywhere.
        group: inputs that share a scale; divides ``I``.
        chip: None for the host.
        interpret: execute on the host, or simulate the chip's memories there.
    """
    with jax.enable_x64(False):
        if not multiplies_pairs(len(x_TI), pairs_OJ.shape[1], group, chip):
            return widened_product(x_TI, widened(pairs_OJ, scale_OG, zero_OG, group, x_TI.dtype))
        scale, zero = (
            None if grid is None else scales_by_step(grid[None], pairs_OJ.shape[1], group // 2)
            for grid in (scale_OG, zero_OG)
        )
        weight = Weight(pairs_OJ[None], scale, zero, group)
        return quantized_matmul(x_TI, weight, out_dtype=x_TI.dtype, chip=chip, interpret=interpret)


def multiplies_pairs(rows: int, columns: int, group: int, chip: Chip | None) -> bool:
    """Whether the kernel takes such groups, and is not slower than a product with weights that are widened before.

    Of groups that share a register, each takes a product over all of it. That much more arithmetic is to take no longer
    than writing widened weights and reading them.
    """
    if group % 2 or not fits_lanes(columns, group // 2):
        return False
    more = sums_per_product(columns, group // 2) - 1
    return 2 * rows * more <= WIDENED_BYTES * (chip or V5E).ridge


def widened(codes_OJ: Array, scale_OG: Array, zero_OG: Array | None, group: int, dtype: DTypeLike) -> Array:
    """A weight ``[..., O, I]`` in a wide dtype."""
    if codes_OJ.dtype == jnp.uint8:
        values = jnp.stack([codes_OJ & 0xF, codes_OJ >> 4], axis=-1)
        codes_OJ = values.reshape(*codes_OJ.shape[:-1], -1).astype(jnp.float32)
        zero_OG = jnp.full_like(scale_OG, 8) if zero_OG is None else zero_OG
    inputs = codes_OJ.shape[-1]
    wide_OI = codes_OJ.astype(jnp.float32)
    if zero_OG is not None:
        wide_OI -= _repeated(zero_OG, group, inputs)
    return (wide_OI * _repeated(scale_OG, group, inputs)).astype(dtype)


def widened_product(x_TI: Array, weight_OI: Array) -> Array:
    """``x @ weightᵀ``, summed in float32."""
    precision = lax.Precision.HIGHEST if x_TI.dtype == jnp.float32 else lax.Precision.DEFAULT
    dot = lax.dot_general(
        x_TI, weight_OI, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    return dot.astype(x_TI.dtype)


def _repeated(grid_OG: Array, group: int, inputs: int) -> Array:
    return jnp.repeat(grid_OG.astype(jnp.float32), group, axis=-1)[..., :inputs]
