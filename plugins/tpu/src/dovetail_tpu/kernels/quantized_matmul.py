"""Products of activations with quantized weights, scaled as they are summed.

A scale belongs to an output and a group of inputs, so it is a factor of a group's sum: weights enter the matrix unit as
they are stored, and what is multiplied by scales are sums. Activations are wide, or quantized in the same groups, each
row by a scale of its own. Where the matrix unit does not multiply what is stored, it is widened in vector memory.

Letters: ``R`` rows of a tile, ``J`` columns of a weight, ``S`` steps over columns, ``G`` groups of one step, ``P``
inputs in one column (see :mod:`dovetail_tpu.kernels.int4_matmul`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from dovetail_tpu.kernels.chip import LANES, Chip
from dovetail_tpu.kernels.product_tiles import (
    CHUNK,
    ProductShape,
    Tiles,
    groups_by_step,
    product_tiles,
    sums_per_product,
)


class Weight(NamedTuple):
    """Quantized weights of one layer, or plain ones.

    Attributes:
        codes_EOJ: ``[E, O, J]``: int8, float8_e4m3fn, pairs of 4-bit values in uint8, or a wide dtype.
        scale_ESGO: float32 scales by step, from :func:`scales_by_step`; None for plain weights.
        zero_ESGO: zero points of pairs, likewise; None means 8 everywhere.
        group: inputs that share a scale.
    """

    codes_EOJ: Array
    scale_ESGO: Array | None
    zero_ESGO: Array | None
    group: int


def quantized_matmul(
    x_TI: Array,
    weight: Weight,
    x_scale_TG: Array | None = None,
    *,
    out_dtype: DTypeLike,
    chip: Chip | None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Array:
    """``(x × x_scale) @ (weight × scale)ᵀ``.

    Args:
        x_TI: ``[T, I]``, wide, or in the dtype of the weight.
        weight: of one layer, ``E = 1``.
        x_scale_TG: float32 scales of quantized activations, ``[T, 1]``, or in the groups of the weight.
        out_dtype: of the result ``[T, O]``.
        chip: whose matrix unit multiplies; None for the host's.
        interpret: execute on the host, or simulate the chip's memories there.
    """
    with jax.enable_x64(False):
        rows = len(x_TI)
        if not rows:
            return jnp.zeros((0, weight.codes_EOJ.shape[1]), out_dtype)
        tiles = product_tiles(chip, shape_of(rows, x_TI.dtype, weight, out_dtype, chip))
        count = pl.cdiv(rows, tiles.rows)
        experts = jnp.append(jnp.zeros(count, jnp.int32), jnp.int32(count))
        return tiled_product(
            x_TI, weight, x_scale_TG, experts, tiles, out_dtype=out_dtype, chip=chip, interpret=interpret, is_full=True
        )


def scales_by_step(scale_EOG: Array, columns: int, group: int) -> Array:
    """:func:`grids_by_step` of numbers that lie by output."""
    return grids_by_step(jnp.swapaxes(scale_EOG, 1, 2), columns, group)


def grids_by_step(grid_EGO: Array, columns: int, group: int) -> Array:
    """Scales, or zero points, in the order in which steps read them: float32 ``[E, S, G, O]``.

    Args:
        grid_EGO: a number per group and per output.
        columns: of the weight, ``J``.
        group: columns that share a scale; all of them, if that is not less.
    """
    experts, groups, outputs = grid_EGO.shape
    steps, per_step = groups_by_step(columns, group)
    grid_EGO = jnp.pad(grid_EGO.astype(jnp.float32), ((0, 0), (0, steps * per_step - groups), (0, 0)))
    return grid_EGO.reshape(experts, steps, per_step, outputs)


def product_dtype(x_dtype: DTypeLike, code_dtype: DTypeLike, chip: Chip | None) -> jnp.dtype[Any]:
    """What enters the matrix unit. bfloat16 holds every int8, float8_e4m3fn and 4-bit value."""
    rows, codes, chosen = jnp.dtype(x_dtype), jnp.dtype(code_dtype), jnp.dtype(jnp.bfloat16)
    if rows.itemsize > 1:
        chosen = rows
    elif chip is None:
        chosen = jnp.dtype(jnp.float32)
    elif chip.int8_products if codes == jnp.int8 else chip.fp8_products:
        chosen = codes
    return cast("jnp.dtype[Any]", chosen)


def shape_of(
    rows: int,
    dtype: DTypeLike,
    weight: Weight,
    out_dtype: DTypeLike,
    chip: Chip | None,
    tile_rows: int | None = None,
) -> ProductShape:
    """What tiles depend on."""
    codes = weight.codes_EOJ
    _, outputs, columns = codes.shape
    parts = parts_of(codes.dtype)
    return ProductShape(
        rows=rows,
        outputs=outputs,
        columns=columns,
        group=weight.group // parts,
        parts=parts,
        itemsize=jnp.dtype(dtype).itemsize,
        weight_itemsize=codes.dtype.itemsize,
        product_itemsize=product_dtype(dtype, codes.dtype, chip).itemsize,
        out_itemsize=jnp.dtype(out_dtype).itemsize,
        tile_rows=tile_rows,
    )


def parts_of(dtype: DTypeLike) -> int:
    """Inputs in a column of such codes."""
    return 2 if jnp.dtype(dtype) == jnp.uint8 else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Form:
    """What a launch is compiled for, besides shapes of arrays.

    Attributes:
        columns: of the weight.
        group: columns that share a scale.
        ragged: floating-point codes beyond the last column are to be hidden: they may be NaN.
        shift: subtracted from 4-bit values.
        products: what enters the matrix unit.
    """

    columns: int
    step: int
    group: int
    ragged: bool
    shift: int
    products: jnp.dtype[Any]

    @property
    def is_grouped(self) -> bool:
        return self.group < self.columns

    @property
    def spans(self) -> Iterator[tuple[slice, int, int]]:
        """Columns that are multiplied at a time, the first of their groups, and how many those are."""
        if not self.is_grouped:
            for first in range(0, self.step, CHUNK):
                yield slice(first, min(first + CHUNK, self.step)), 0, 1
            return
        size = max(self.group, LANES)
        for first in range(0, self.step, size):
            yield slice(first, first + size), first // self.group, sums_per_product(self.columns, self.group)


def tiled_product(
    x_TI: Array,
    weight: Weight,
    x_scale_TG: Array | None,
    experts: Array,
    tiles: Tiles,
    *,
    out_dtype: DTypeLike,
    chip: Chip | None,
    interpret: bool | pltpu.InterpretParams,
    is_full: bool = False,
) -> Array:
    """Products of tiles of rows, each with the weight of one expert: ``[T, O]``.

    Two cores behind one device share tiles of outputs; and tiles of rows, if all have some. One that has none repeats
    the block of the last that has, which another core may be writing.

    Args:
        experts: int32: of each tile of rows, then the number of tiles that have rows; results of others are undefined.
        is_full: all tiles have rows.
    """
    codes = weight.codes_EOJ
    columns, parts = codes.shape[2], parts_of(codes.dtype)
    form = _Form(
        columns=columns,
        step=tiles.columns,
        group=weight.group // parts,
        ragged=columns % tiles.columns != 0 and not jnp.issubdtype(codes.dtype, jnp.integer),
        shift=8 if weight.zero_ESGO is None else 0,
        products=product_dtype(x_TI.dtype, codes.dtype, chip),
    )
    steps = pl.cdiv(columns, tiles.columns)
    x_PTJ = _by_part(x_TI, parts, steps * tiles.columns)
    sums = None if weight.zero_ESGO is None else _sums(x_PTJ, form, steps)
    x_scale = None if x_scale_TG is None else _row_scales(x_scale_TG, form)
    arrays = {"codes": codes, "x": x_PTJ, "scale": weight.scale_ESGO, "zero": weight.zero_ESGO, "sums": sums}
    arrays = {name: array for name, array in {**arrays, "x_scale": x_scale}.items() if array is not None}
    return pl.pallas_call(
        functools.partial(_kernel, names=tuple(arrays), form=form, steps=steps),
        out_shape=jax.ShapeDtypeStruct((len(x_TI), codes.shape[1]), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(codes.shape[1], tiles.outputs), len(experts) - 1, steps),
            in_specs=[_block(name, array, tiles, steps) for name, array in arrays.items()],
            out_specs=pl.BlockSpec((tiles.rows, tiles.outputs), lambda o, t, s, experts: (_tile(t, experts), o)),
            scratch_shapes=[pltpu.VMEM((tiles.rows, tiles.outputs), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel" if is_full else "arbitrary", "arbitrary"),
            vmem_limit_bytes=tiles.vmem_bytes,
        ),
        interpret=interpret,
        name="quantized_matmul",
    )(experts, *arrays.values())


def _by_part(x_TI: Array, parts: int, columns: int) -> Array:
    """``[P, T, J]``: inputs by the part of a column that their weight lies in, with zeros for columns that are none."""
    x_PTJ = jnp.moveaxis(x_TI.reshape(len(x_TI), -1, parts), 2, 0)
    return jnp.pad(x_PTJ, ((0, 0), (0, 0), (0, columns - x_PTJ.shape[2])))


def _sums(x_PTJ: Array, form: _Form, steps: int) -> Array:
    """Of each row, over each group: ``[S, T, G]``. A zero point is subtracted from as many inputs."""
    sums_TJ = x_PTJ.astype(jnp.float32).sum(0)
    if not form.is_grouped:
        return sums_TJ.sum(1).reshape(1, -1, 1)
    return jnp.moveaxis(sums_TJ.reshape(len(sums_TJ), steps, -1, form.group).sum(-1), 0, 1)


def _row_scales(x_scale_TG: Array, form: _Form) -> Array:
    """``[S, T, G]``."""
    by_step = scales_by_step(x_scale_TG[None], form.columns, form.group)[0]
    return jnp.swapaxes(by_step, 1, 2)


def _tile(t: Array, experts: Array) -> Array:
    """The tile of rows, or the last that has rows: nothing is copied for others."""
    return jnp.maximum(jnp.minimum(t, experts[experts.shape[0] - 1] - 1), 0)


def _step(t: Array, s: Array, experts: Array, steps: int) -> Array:
    return jnp.where(t < experts[experts.shape[0] - 1], s, steps - 1)


def _block(name: str, array: Array, tiles: Tiles, steps: int) -> pl.BlockSpec:
    """Which part of an array a step reads."""
    per_step = array.shape[1 if name in ("scale", "zero") else 0] > 1

    def step(t: Array, s: Array, experts: Array) -> Array | int:
        return _step(t, s, experts, steps) if per_step else 0

    if name == "codes":
        return pl.BlockSpec(
            (None, tiles.outputs, tiles.columns),
            lambda o, t, s, experts: (experts[_tile(t, experts)], o, _step(t, s, experts, steps)),
        )
    if name == "x":
        return pl.BlockSpec(
            (array.shape[0], tiles.rows, tiles.columns),
            lambda o, t, s, experts: (0, _tile(t, experts), _step(t, s, experts, steps)),
        )
    if name in ("scale", "zero"):
        return pl.BlockSpec(
            (None, None, array.shape[2], tiles.outputs),
            lambda o, t, s, experts: (experts[_tile(t, experts)], step(t, s, experts), 0, o),
        )
    return pl.BlockSpec(
        (None, tiles.rows, array.shape[2]), lambda o, t, s, experts: (step(t, s, experts), _tile(t, experts), 0)
    )


def _kernel(experts_ref: Array, *refs: Array, names: tuple[str, ...], form: _Form, steps: int) -> None:
    """One step of one tile."""
    *given, out_ref, acc_RO_ref = refs
    inputs = dict(zip(names, given, strict=True))
    s = pl.program_id(2)

    @pl.when(pl.program_id(1) < experts_ref[experts_ref.shape[0] - 1])
    def compute() -> None:
        @pl.when(s == 0)
        def clear() -> None:
            acc_RO_ref[...] = jnp.zeros_like(acc_RO_ref)

        for columns, first_group, groups in form.spans:
            sums = _group_sums(inputs, columns, first_group, groups, s, form)
            acc_RO_ref[...] += sum(sums[1:], start=sums[0])

        @pl.when(s == steps - 1)
        def finish() -> None:
            out_RO = acc_RO_ref[...] if form.is_grouped else _scaled(acc_RO_ref[...], inputs, 0)
            out_ref[...] = out_RO.astype(out_ref.dtype)


def _group_sums(
    inputs: dict[str, Array], columns: slice, first_group: int, groups: int, s: Array, form: _Form
) -> list[Array]:
    """``[R, O]`` of each group in these columns, with its scales if sums of groups are scaled apart."""
    x_ref, sums = inputs["x"], []
    precision = lax.Precision.HIGHEST if form.products == jnp.float32 else lax.Precision.DEFAULT
    wide = jnp.int32 if form.products == jnp.int8 else jnp.float32
    values = [_values(inputs["codes"], columns, part, s, form) for part in range(x_ref.shape[0])]
    for g in range(groups):
        sum_RO: Array | float = 0.0
        for part, value_OJ in enumerate(values):
            x_RJ = x_ref[part, :, columns].astype(form.products)
            if groups > 1:
                own = lax.broadcasted_iota(jnp.int32, x_RJ.shape, 1) // form.group == g
                x_RJ = jnp.where(own, x_RJ, jnp.zeros_like(x_RJ))
            contract = (((1,), (1,)), ((), ()))
            product = lax.dot_general(x_RJ, value_OJ, contract, precision=precision, preferred_element_type=wide)
            sum_RO += product.astype(jnp.float32)
        sums.append(_scaled(sum_RO, inputs, first_group + g) if form.is_grouped else sum_RO)
    return sums


def _values(codes_ref: Array, columns: slice, part: int, s: Array, form: _Form) -> Array:
    """What of the weight is multiplied, ``[O, J]``."""
    codes = codes_ref[:, columns]
    if codes.dtype == jnp.uint8:
        pairs = codes.astype(jnp.int32)
        value = (pairs >> 4 if part else pairs & 0xF) - form.shift
        return value.astype(jnp.float32).astype(form.products)
    if form.ragged:
        column = s * form.step + columns.start + lax.broadcasted_iota(jnp.int32, codes.shape, 1)
        return jnp.where(column < form.columns, codes.astype(form.products), jnp.zeros(codes.shape, form.products))
    return codes.astype(form.products)


def _scaled(sum_RO: Array, inputs: dict[str, Array], g: int) -> Array:
    """The sum of a group with its zero point and scales."""
    if "zero" in inputs:
        sum_RO = sum_RO - inputs["sums"][:, g : g + 1] * inputs["zero"][g : g + 1]
    if "scale" in inputs:
        sum_RO = sum_RO * inputs["scale"][g : g + 1]
    return sum_RO * inputs["x_scale"][:, g : g + 1] if "x_scale" in inputs else sum_RO
