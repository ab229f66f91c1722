"""Products of a weight with some dozens of tokens on Hopper, which are bound by the weight's bytes.

A program computes a tile of outputs for all tokens, and walks through the inputs. The copy engine keeps its next steps
under way, and has fetched the first ones' weights when the kernel before ends.

Faster than memory, shared memory is what limits a tile: per step it takes weights and tokens in and gives both out, at
128 bytes a cycle. So tiles are as tall as leaves enough of them. Where inputs are many, two programs share those of a
tile, and the last of them joins what both have written; where they are few, that would take longer than it saves.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dovetail_cuda.kernels.counters import counters
from dovetail_cuda.kernels.overlap import overlapped, release, wait
from dovetail_cuda.kernels.prompts import copy
from dovetail_cuda.kernels.skinny_support import MOST, Tiling, tile

barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # by release of Triton


def multiply(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, tiling: Tiling | None = None, *, gated: bool = False
) -> Tensor:
    """``x @ weightᵀ + bias`` of a weight that suits; cut as measures best, unless a tiling is given.

    Args:
        gated: the outputs are gate, then up; return ``silu(gate) × up``.

    Raises:
        ValueError: the tiling does not suit gates.
    """
    (tokens, inputs), outputs = x_TI.shape, len(weight_OI) // (1 + gated)
    tiling = tiling or tile(len(weight_OI), inputs, gated)
    tiling.check(gated)
    width = tiling.rows // (1 + gated)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    x, weight = (
        TensorDescriptor(matrix, [*matrix.shape], [*matrix.stride()], [rows, tiling.block], layout)
        for matrix, rows in ((x_TI, MOST), (weight_OI, width))
    )
    out_TO = torch.empty((tokens, outputs), dtype=x_TI.dtype, device=x_TI.device)
    tiles, splits = triton.cdiv(outputs, width), tiling.splits
    parts = arrivals = out_TO  # not read
    if splits > 1:
        parts = torch.empty((splits, tokens, outputs), dtype=torch.float32, device=x_TI.device)
        arrivals = counters(x_TI.device, triton.next_power_of_2(tiles))
    _skinny_kernel[(tiles, splits)](
        x,
        weight,
        out_TO if bias_O is None else bias_O.contiguous(),
        out_TO,
        parts,
        arrivals,
        tokens,
        outputs,
        triton.cdiv(inputs, tiling.block),
        SPLITS=splits,
        TOKENS=MOST,
        WIDTH=width,
        BLOCK=tiling.block,
        STAGES=tiling.stages,
        BIAS=bias_O is not None,
        GATED=gated,
        num_warps=4,
        **overlapped(x_TI.device),
    )
    return out_TO


@gluon.jit(do_not_specialize=["tokens", "all_steps"])
def _skinny_kernel(
    inputs: tma.tensor_descriptor,
    weights: tma.tensor_descriptor,
    bias_ptr: gl.tensor,
    out_ptr: gl.tensor,
    parts_ptr: gl.tensor,
    arrivals_ptr: gl.tensor,
    tokens: gl.tensor,
    outputs: gl.tensor,
    all_steps: gl.tensor,
    SPLITS: gl.constexpr,
    TOKENS: gl.constexpr,
    WIDTH: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    BIAS: gl.constexpr,
    GATED: gl.constexpr,
    OVERLAP: gl.constexpr,
) -> None:
    release(OVERLAP)
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    PARTS: gl.constexpr = 2 if GATED else 1
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    tile, split = gl.program_id(0), gl.program_id(1)
    row, step, stop = tile * WIDTH, split * all_steps // SPLITS, (split + 1) * all_steps // SPLITS
    w = gl.allocate_shared_memory(dtype, [PARTS * STAGES, WIDTH, BLOCK], weights.layout)
    x = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, BLOCK], inputs.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    barrier()
    for i in gl.static_range(STAGES):
        _ask_weights(inputs, weights, w, full, i, step + i, stop, row, outputs, PARTS)
    wait(OVERLAP)
    for i in gl.static_range(STAGES):
        copy(inputs, [0, (step + i) * BLOCK], full.index(i), x.index(i), step + i < stop)
    acc = gl.zeros([TOKENS, WIDTH], gl.float32, SUMS)
    factor = gl.zeros([TOKENS, WIDTH], gl.float32, SUMS)
    for i in range(stop - step):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        asked = warpgroup_mma(x.index(stage), w.index(PARTS * stage).permute((1, 0)), acc, is_async=True)
        if GATED:
            factor_asked = warpgroup_mma(x.index(stage), w.index(2 * stage + 1).permute((1, 0)), factor, is_async=True)
            acc, factor = warpgroup_mma_wait(0, [asked, factor_asked])
        else:
            acc = warpgroup_mma_wait(0, [asked])
        barrier()  # every warp has read the stage
        ahead = step + i + STAGES
        _ask_weights(inputs, weights, w, full, stage, ahead, stop, row, outputs, PARTS)
        copy(inputs, [0, ahead * BLOCK], full.index(stage), x.index(stage), ahead < stop)
    token = gl.expand_dims(gl.arange(0, TOKENS, layout=gl.SliceLayout(1, SUMS)), 1)
    column = row + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, SUMS))
    exists = column < outputs
    places = token.to(gl.int64) * outputs + gl.expand_dims(column, 0)
    mask = (token < tokens) & gl.expand_dims(exists, 0)
    is_last = True
    if SPLITS > 1:
        stride = tokens.to(gl.int64) * outputs
        gl.store(parts_ptr + split * stride + places, acc, mask=mask)
        barrier()
        is_last = gl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
        if is_last:
            acc = gl.load(parts_ptr + places, mask=mask)
            for part in gl.static_range(1, SPLITS):
                acc += gl.load(parts_ptr + part * stride + places, mask=mask)
            gl.store(arrivals_ptr + tile, 0)  # for the next launch
    if BIAS:
        acc += gl.expand_dims(gl.load(bias_ptr + column, mask=exists, other=0.0).to(gl.float32), 0)
        if GATED:
            factor += gl.expand_dims(gl.load(bias_ptr + outputs + column, mask=exists, other=0.0).to(gl.float32), 0)
    if GATED:
        acc = acc / (1.0 + gl.exp(-acc)) * factor
    gl.store(out_ptr + places, acc.to(dtype), mask=mask & is_last)


@gluon.jit
def _ask_weights(
    inputs: tma.tensor_descriptor,
    weights: tma.tensor_descriptor,
    w: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    stage: gl.tensor,
    step: gl.tensor,
    stop: gl.tensor,
    row: gl.tensor,
    outputs: gl.tensor,
    PARTS: gl.constexpr,
) -> None:
    """Have a stage expect a step's weights and tokens, and copy the weights, if there is such a step.

    What lies beyond a matrix comes as zeros.
    """
    BLOCK: gl.constexpr = inputs.block_type.shape[1]
    SIZE: gl.constexpr = (inputs.block_type.shape[0] + PARTS * weights.block_type.shape[0]) * BLOCK * 2
    exists = step < stop
    mbarrier.expect(full.index(stage), SIZE, pred=exists)
    for part in gl.static_range(PARTS):
        copy(weights, [row + part * outputs, step * BLOCK], full.index(stage), w.index(PARTS * stage + part), exists)
