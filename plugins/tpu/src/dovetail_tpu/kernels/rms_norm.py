"""Root-mean-square norm in one pass over its rows, with the residual addition before it and rounding to 8 bits after.

XLA fuses these as well, but reads the rows again once their squares are summed: from vector memory where they fit, from
HBM where they do not. So the kernel is for steps of many tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from dovetail_tpu.kernels.chip import LANES, Chip

KEPT_SHARE = 0.25
"""Of vector memory. XLA keeps what is less there, beside its other values."""
NAMED_SHARE = 0.4
VMEM_SHARE = 0.9375
ROW_TILE = 32
"""Rows of a register of bytes."""
MOST_ROWS = 256
TINY = 1e-12
"""The largest magnitude of rows of zeros."""


class Normed(NamedTuple):
    """What a norm returns.

    Attributes:
        norm_TD: in the dtype of the rows, or in 8 bits.
        scale_TG: float32 scales of 8-bit numbers, else None.
        sum_TD: the rows with the residual, in their dtype; None without one.
    """

    norm_TD: Array
    scale_TG: Array | None
    sum_TD: Array | None


def rms_norm(
    x_TD: Array,
    weight_D: Array,
    residual_TD: Array | None = None,
    *,
    eps: float,
    dtype: DTypeLike | None = None,
    group: int | None = None,
    chip: Chip,
    interpret: bool | pltpu.InterpretParams = False,
) -> Normed:
    """Scale each row to root mean square 1, then by ``weight`` (Zhang and Sennrich 2019, arXiv:1910.07467).

    Args:
        x_TD: ``[T, D]``, bfloat16 or float32.
        weight_D: ``[D]``.
        residual_TD: ``[T, D]``, added before; the norm reads the rounded sum.
        eps: added to the mean square.
        dtype: int8 or float8_e4m3fn, to which the rounded norm is quantized, each row or group by its largest
            magnitude; None leaves it wide.
        group: elements that share a scale, whole lanes that divide D; None means the row.
        chip: whose vector memory holds the rows.
        interpret: execute on the host, or simulate the chip's memories there.
    """
    with jax.enable_x64(False):
        tokens, width = x_TD.shape
        form = _Form(eps=eps, adds=residual_TD is not None, dtype=dtype and jnp.dtype(dtype), group=group or width)
        rows = min(tokens, _rows(chip, width, x_TD.dtype.itemsize))
        block = pl.BlockSpec((rows, width), lambda t: (t, 0))
        outputs = {"norm": jax.ShapeDtypeStruct(x_TD.shape, form.dtype or x_TD.dtype)}
        if form.dtype is not None:
            outputs["scale"] = jax.ShapeDtypeStruct((tokens, width // form.group), jnp.float32)
        if form.adds:
            outputs["sum"] = jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype)
        inputs = [x_TD, weight_D[None]] + ([residual_TD] if form.adds else [])
        results = pl.pallas_call(
            functools.partial(_kernel, form=form, names=tuple(outputs)),
            out_shape=list(outputs.values()),
            grid=(pl.cdiv(tokens, rows),),
            in_specs=[block, pl.BlockSpec((1, width), lambda t: (0, 0)), *[block] * form.adds],
            out_specs=[pl.BlockSpec((rows, out.shape[1]), lambda t: (t, 0)) for out in outputs.values()],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",), vmem_limit_bytes=int(chip.vmem_bytes * VMEM_SHARE)
            ),
            interpret=interpret,
            name="rms_norm",
        )(*inputs)
        found = dict(zip(outputs, results, strict=True))
        return Normed(found["norm"], found.get("scale"), found.get("sum"))


def reads_once(chip: Chip | None, tokens: int, width: int, itemsize: int, group: int | None = None) -> bool:
    """Whether the kernel is worth its launch: the rows do not stay in vector memory between two passes."""
    if chip is None or width % LANES or (group is not None and (group % LANES or width % group)):
        return False
    fits = ROW_TILE * _row_bytes(width, itemsize) <= chip.vmem_bytes * NAMED_SHARE
    return fits and tokens * width * itemsize > chip.vmem_bytes * KEPT_SHARE


@dataclass(frozen=True, kw_only=True, slots=True)
class _Form:
    """What a launch is compiled for, besides shapes of arrays."""

    eps: float
    adds: bool
    dtype: jnp.dtype[Any] | None
    group: int


def _rows(chip: Chip, width: int, itemsize: int) -> int:
    """Of a block."""
    fitting = int(chip.vmem_bytes * NAMED_SHARE) // _row_bytes(width, itemsize) // ROW_TILE * ROW_TILE
    return min(MOST_ROWS, max(ROW_TILE, fitting))


def _row_bytes(width: int, itemsize: int) -> int:
    """Of vector memory. Each of up to four arrays is buffered twice; three float32 values are there at a time."""
    return width * (8 * itemsize + 12)


def _kernel(x_ref: Array, weight_ref: Array, *refs: Array, form: _Form, names: tuple[str, ...]) -> None:
    """A block of rows. Those beyond the last are whatever lies there, and stay there."""
    outputs = dict(zip(names, refs[form.adds :], strict=True))
    x_RD = x_ref[...]
    if form.adds:
        x_RD = x_RD + refs[0][...]
        outputs["sum"][...] = x_RD
    wide_RD = x_RD.astype(jnp.float32)
    mean_R1 = jnp.mean(wide_RD * wide_RD, axis=1, keepdims=True)
    norm_RD = (wide_RD * lax.rsqrt(mean_R1 + form.eps) * weight_ref[...].astype(jnp.float32)).astype(x_RD.dtype)
    if form.dtype is None:
        outputs["norm"][...] = norm_RD
        return
    for g in range(norm_RD.shape[1] // form.group):
        columns = slice(g * form.group, (g + 1) * form.group)
        values_RD, scale_R1 = _quantized(norm_RD[:, columns].astype(jnp.float32), form.dtype)
        outputs["norm"][:, columns] = values_RD
        outputs["scale"][:, g : g + 1] = scale_R1


def _quantized(x_RD: Array, dtype: jnp.dtype[Any]) -> tuple[Array, Array]:
    """Numbers of 8 bits, and the scale of each row."""
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    largest = 127.0 if is_integer else float(jnp.finfo(dtype).max)
    scale_R1 = jnp.maximum(jnp.max(jnp.abs(x_RD), axis=1, keepdims=True), TINY) / largest
    values_RD = jnp.clip(x_RD / scale_R1, -largest, largest)
    return (jnp.round(values_RD).astype(jnp.int32) if is_integer else values_RD).astype(dtype), scale_R1
