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


def multiply(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, tiling: Tiling | None = None) -> Tensor:
    """``x @ weightᵀ + bias`` of a weight that suits; cut as measures best, unless a tiling is given."""
    x = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
    (tokens, inputs), outputs, itemsize = x.shape, len(weight_OI), weight_OI.element_size()
    tiling = tiling or tile(outputs, inputs, tokens, itemsize)
    out_TO = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    _matvec_kernel[(triton.cdiv(outputs, tiling.rows),)](
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
        ROWS=tiling.rows,
        BLOCK=tiling.block,
        ACCESS=ACCESS // itemsize,
        AHEAD=min(AHEAD, tiling.rows * inputs * itemsize) // ACCESS * ACCESS,
        BIAS=bias_O is not None,
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


@triton.jit(do_not_specialize=["tokens"])
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
    OVERLAP: tl.constexpr,
) -> None:
    release(OVERLAP)
    first = tl.program_id(0) * ROWS
    start = weight_ptr + first.to(tl.int64) * weight_stride_o
    prefetch(start, tl.where(first + ROWS <= outputs, AHEAD, 0), OVERLAP)
    rows = first + tl.arange(0, ROWS)
    sources = tl.minimum(rows, outputs - 1).to(tl.int64)
    token, columns = tl.arange(0, TOKENS), tl.arange(0, BLOCK)[None, None, :]
    exists = token < tokens
    x_places = x_ptr + token[None, :, None] * x_stride_t + columns
    weight_places = weight_ptr + sources[:, None, None] * weight_stride_o + columns
    wait(OVERLAP)
    acc = tl.zeros([ROWS, TOKENS, BLOCK // ACCESS], dtype=tl.float32)
    for at in tl.static_range(0, INPUTS, BLOCK):
        if at + BLOCK <= INPUTS:
            weight = tl.load(weight_places + at, eviction_policy="evict_first")
            x = tl.load(x_places + at, mask=exists[None, :, None], other=0.0)
        else:
            inside = at + columns < INPUTS
            weight = tl.load(weight_places + at, mask=inside, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_places + at, mask=inside & exists[None, :, None], other=0.0)
        products = weight.to(tl.float32) * x.to(tl.float32)
        acc += tl.sum(tl.reshape(products, [ROWS, TOKENS, BLOCK // ACCESS, ACCESS]), axis=3)
    out = tl.sum(acc, axis=2)
    if BIAS:
        out += tl.load(bias_ptr + sources).to(tl.float32)[:, None]
    places = out_ptr + token[None, :] * outputs + rows[:, None]
    tl.store(places, out.to(out_ptr.dtype.element_ty), mask=(rows < outputs)[:, None] & exists[None, :])
