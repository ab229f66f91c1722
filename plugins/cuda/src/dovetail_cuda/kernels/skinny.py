"""Products of a weight with some dozens of tokens, which the weight's bytes bound like those with one.

A program computes ``ROWS`` outputs of all tokens. Where there are too few such tiles to read from the whole memory at
once, the inputs of each are split among programs, and a second kernel joins the parts in their order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail_cuda.kernels.matvec import ACCESS, ALIGNED
from dovetail_cuda.kernels.overlap import overlapped, prefetch_each, release, wait

MOST = 64
"""Tokens up to which this is faster than the library's product."""
FEWEST = 16
"""Tokens of a product in tensor cores; fewer are filled up."""
ROWS, STEP = 128, 64
"""Outputs of a tile, inputs of a step."""
FULL = 64
"""Programs that read about as fast as memory delivers."""
SHORTEST = 4
"""Steps of a part, at least."""
AHEAD = 512
"""Bytes of each row that a program asks for before the kernel ahead has ended."""
JOINED = 512
"""Elements that a program joins."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a launch is cut.

    Attributes:
        rows: outputs of a program.
        block: inputs of a step.
        splits: programs that share a tile's inputs.
        warps, stages: of a program.
    """

    rows: int
    block: int
    splits: int
    warps: int = 4
    stages: int = 4


def suits(tokens: int, weight_OI: Tensor) -> bool:
    """Whether there are dozens of tokens, and tensor cores can read rows of the weight in whole steps."""
    is_short = weight_OI.dtype in (torch.bfloat16, torch.float16)
    is_aligned = weight_OI.stride(0) % ALIGNED == 0 and weight_OI.data_ptr() % ACCESS == 0
    is_aligned &= weight_OI.stride(1) == 1 and weight_OI.shape[1] % STEP == 0
    return 0 < tokens <= MOST and is_short and is_aligned


def multiply(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, tiling: Tiling | None = None, *, gated: bool = False
) -> Tensor:
    """``x @ weightᵀ + bias`` of a weight that suits; cut as measures best, unless a tiling is given.

    Args:
        gated: the outputs are gate, then up; return ``silu(gate) × up``. A tile has rows of both, and its inputs are
            not split.
    """
    x = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
    (tokens, inputs), outputs = x.shape, len(weight_OI) // (1 + gated)
    tiling = tiling or tile(len(weight_OI), inputs)
    if gated:
        tiling = replace(tiling, splits=1)
    overlap = overlapped(x.device)
    out_TO = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    parts = out_TO
    if tiling.splits > 1:
        parts = torch.empty((tiling.splits, tokens, outputs), dtype=torch.float32, device=x.device)
    bias = x if bias_O is None else bias_O.contiguous()
    _skinny_kernel[(triton.cdiv(outputs, tiling.rows // (1 + gated)), tiling.splits)](
        x,
        weight_OI,
        bias,
        parts,
        tokens,
        outputs,
        inputs,
        triton.cdiv(inputs // tiling.block, tiling.splits),
        x.stride(0),
        weight_OI.stride(0),
        TOKENS=max(FEWEST, triton.next_power_of_2(tokens)),
        ROWS=tiling.rows,
        BLOCK=tiling.block,
        AHEAD=AHEAD,
        BIAS=bias_O is not None and tiling.splits == 1,
        GATED=gated,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        **overlap,
    )
    if tiling.splits > 1:
        _join_kernel[(triton.cdiv(out_TO.numel(), JOINED),)](
            parts,
            bias,
            out_TO,
            out_TO.numel(),
            outputs,
            SPLITS=tiling.splits,
            BLOCK=JOINED,
            BIAS=bias_O is not None,
            **overlap,
        )
    return out_TO


@cache
def tile(outputs: int, inputs: int) -> Tiling:
    """How to cut a product of this size."""
    tiles, steps = triton.cdiv(outputs, ROWS), inputs // STEP
    return Tiling(rows=ROWS, block=STEP, splits=max(1, min(FULL // tiles, steps // SHORTEST)))


@triton.jit(do_not_specialize=["tokens", "inputs", "steps"])
def _skinny_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tokens: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    steps: tl.tensor,
    x_stride_t: tl.tensor,
    weight_stride_o: tl.tensor,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    release(OVERLAP)
    split = tl.program_id(1)
    begin = split * steps * BLOCK  # a multiple of the step that the compiler sees: loads are whole accesses
    end = tl.minimum(begin + steps * BLOCK, inputs)
    WIDTH: tl.constexpr = ROWS // 2 if GATED else ROWS
    lanes, first = tl.arange(0, ROWS), tl.program_id(0) * WIDTH
    exists_row = first + lanes % WIDTH < outputs
    numbers = tl.minimum(first + lanes % WIDTH, outputs - 1) + lanes // WIDTH * outputs
    sources = weight_ptr + numbers.to(tl.int64) * weight_stride_o
    ahead = tl.minimum(AHEAD, (end - begin) * weight_ptr.dtype.element_ty.primitive_bitwidth // 8)
    prefetch_each(sources + begin, tl.where(exists_row, ahead, 0), OVERLAP)
    token, k = tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    exists = token < tokens
    x_places = x_ptr + token[None, :] * x_stride_t + k[:, None]
    weight_places = sources[:, None] + k[None, :]
    wait(OVERLAP)
    acc = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
    for at in range(begin, end, BLOCK):
        weight = tl.load(weight_places + at, eviction_policy="evict_first")
        x = tl.load(x_places + at, mask=exists[None, :], other=0.0)
        acc = tl.dot(weight, x, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias_ptr + numbers).to(tl.float32)[:, None]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [2, WIDTH, TOKENS]), [1, 2, 0]))
        acc = gate / (1.0 + tl.exp(-gate)) * up
    rows = first + tl.arange(0, WIDTH)
    places = out_ptr + (split * tokens + token)[None, :].to(tl.int64) * outputs + rows[:, None]
    tl.store(places, acc.to(out_ptr.dtype.element_ty), mask=(rows < outputs)[:, None] & exists[None, :])


@triton.jit(do_not_specialize=["count"])
def _join_kernel(
    parts_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    count: tl.tensor,
    outputs: tl.tensor,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Sum the parts of each element."""
    release(OVERLAP)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = places < count
    wait(OVERLAP)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + split * count + places, mask=mask, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + places % outputs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=mask)
