"""Products of a weight with a few tokens, which are bound by the weight's bytes: matrix times vectors.

A program computes ``ROWS`` outputs of every token. It asks for the first of its rows' bytes before the kernel ahead has
ended, and has all loads under way before it needs the first, in steps of ``BLOCK`` inputs, 16 bytes per thread. The
products are summed in float32 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail_cuda.kernels.overlap import overlapped, prefetch, release, wait

MOST = 4
"""Tokens up to which this is faster than a product of matrices."""
ACCESS = 16
"""Bytes that a thread loads together."""
ALIGNED = 16
"""Elements of whose multiples the compiler knows that they are."""
AHEAD = 4096
"""Bytes that a program asks for before the kernel ahead has ended; many more would keep that one from its own."""
SHARE, FEWEST, MANY = 16384, 1024, 20000
"""Bytes of weights per program; programs below which they get less; and above which they get more."""
WASTED = 6
"""At most one part of so many of a row's steps lies beyond its end."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a launch is cut.

    Attributes:
        rows: outputs of a program.
        block: inputs of a step.
        warps: of a program.
    """

    rows: int
    block: int
    warps: int


def suits(tokens: int, weight_OI: Tensor) -> bool:
    """Whether there are few tokens, and rows of the weight can be read in whole accesses."""
    is_aligned = weight_OI.stride(0) % ALIGNED == 0 and weight_OI.data_ptr() % ACCESS == 0
    return 0 < tokens <= MOST and weight_OI.stride(1) == 1 and is_aligned and weight_OI.shape[1] >= ALIGNED


def multiply(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, tiling: Tiling | None = None, *, gated: bool = False
) -> Tensor:
    """``x @ weightᵀ + bias`` of a weight that suits; cut as measures best, unless a tiling is given.

    Args:
        gated: the outputs are gate, then up; return ``silu(gate) × up``.
    """
    x = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
    (tokens, inputs), outputs, itemsize = x.shape, len(weight_OI) // (1 + gated), weight_OI.element_size()
    tiling = tiling or tile(len(weight_OI), inputs, tokens, itemsize)
    rows = max(1, tiling.rows // (1 + gated))
    out_TO = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    _matvec_kernel[(triton.cdiv(outputs, rows),)](
        x,
        weight_OI,
        x if bias_O is None else bias_O.contiguous(),
        out_TO,
        tokens,
        outputs,
        x.stride(0),
        weight_OI.stride(0),
        INPUTS=inputs,
        TOKENS=triton.next_power_of_2(tokens),
        ROWS=rows,
        BLOCK=tiling.block,
        ACCESS=ACCESS // itemsize,
        AHEAD=min(AHEAD // (1 + gated), rows * inputs * itemsize) // ACCESS * ACCESS,
        BIAS=bias_O is not None,
        GATED=gated,
        num_warps=tiling.warps,
        **overlapped(x.device),
    )
    return out_TO


@cache
def tile(outputs: int, inputs: int, tokens: int, itemsize: int) -> Tiling:
    """How to cut a product of this size."""
    per_warp = 32 * ACCESS // itemsize
    block = min((16 if tokens == 1 else 8) * per_warp, triton.next_power_of_2(inputs))
    while block > 2 * per_warp and -inputs % block > inputs // WASTED:
        block //= 2
    share = max(triton.next_power_of_2(tokens), SHARE // (inputs * itemsize))  # more tokens, more uses of each input
    rows = 1 << (max(1, min(share, outputs // FEWEST)).bit_length() - 1)
    while outputs // rows > MANY:
        rows *= 2
    return Tiling(rows, block, max(1, block // per_warp))


@triton.jit(do_not_specialize=["tokens", "outputs"])
def _matvec_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tokens: tl.tensor,
    outputs: tl.tensor,
    x_stride_t: tl.tensor,
    weight_stride_o: tl.tensor,
    INPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACCESS: tl.constexpr,
    AHEAD: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    release(OVERLAP)
    first = tl.program_id(0) * ROWS
    up_ptr = weight_ptr + outputs.to(tl.int64) * weight_stride_o
    start, ahead = first.to(tl.int64) * weight_stride_o, tl.where(first + ROWS <= outputs, AHEAD, 0)
    prefetch(weight_ptr + start, ahead, OVERLAP)
    if GATED:
        prefetch(up_ptr + start, ahead, OVERLAP)
    rows = first + tl.arange(0, ROWS)
    sources = tl.minimum(rows, outputs - 1).to(tl.int64)
    token, columns = tl.arange(0, TOKENS), tl.arange(0, BLOCK)[None, None, :]
    exists = token < tokens
    x_places = x_ptr + token[None, :, None] * x_stride_t + columns
    places = sources[:, None, None] * weight_stride_o + columns
    wait(OVERLAP)
    out = tl.zeros([ROWS, TOKENS, BLOCK // ACCESS], dtype=tl.float32)
    up = out
    for at in tl.static_range(0, INPUTS, BLOCK):
        inside = at + columns < INPUTS
        x = tl.load(x_places + at, mask=inside & exists[None, :, None], other=0.0).to(tl.float32)
        out += _products(weight_ptr + places + at, inside, x, at + BLOCK > INPUTS, ACCESS)
        if GATED:
            up += _products(up_ptr + places + at, inside, x, at + BLOCK > INPUTS, ACCESS)
    out = tl.sum(out, axis=2)
    if BIAS:
        out += tl.load(bias_ptr + sources).to(tl.float32)[:, None]
    if GATED:
        up = tl.sum(up, axis=2)
        if BIAS:
            up += tl.load(bias_ptr + outputs + sources).to(tl.float32)[:, None]
        out = out / (1.0 + tl.exp(-out)) * up
    out_places = out_ptr + token[None, :] * outputs + rows[:, None]
    tl.store(out_places, out.to(out_ptr.dtype.element_ty), mask=(rows < outputs)[:, None] & exists[None, :])


@triton.jit
def _products(
    places: tl.tensor, inside: tl.tensor, x: tl.tensor, MASKED: tl.constexpr, ACCESS: tl.constexpr
) -> tl.tensor:
    """Weights times inputs, summed over each access: ``[ROWS, TOKENS, BLOCK // ACCESS]``."""
    if MASKED:
        weight = tl.load(places, mask=inside, other=0.0, eviction_policy="evict_first")
    else:
        weight = tl.load(places, eviction_policy="evict_first")
    products = weight.to(tl.float32) * x
    shape: tl.constexpr = [products.shape[0], products.shape[1], products.shape[2] // ACCESS, ACCESS]
    return tl.sum(tl.reshape(products, shape), axis=3)
