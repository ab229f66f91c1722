"""Products of a large weight with some dozens of tokens on Hopper, which are bound by the weight's bytes.

A program computes a tile of outputs for all tokens, and walks through the inputs. The copy engine keeps its next steps
under way. Inputs are not split among programs: joining the parts would take longer than reading the tokens more often,
which come from the cache.
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
    """
    (tokens, inputs), outputs = x_TI.shape, len(weight_OI) // (1 + gated)
    tiling = tiling or tile(len(weight_OI))
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    x, weight = (
        TensorDescriptor(matrix, [*matrix.shape], [*matrix.stride()], [rows, tiling.block], layout)
        for matrix, rows in ((x_TI, MOST), (weight_OI, tiling.half))
    )
    out_TO = torch.empty((tokens, outputs), dtype=x_TI.dtype, device=x_TI.device)
    _skinny_kernel[(triton.cdiv(outputs, tiling.half if gated else 2 * tiling.half),)](
        x,
        weight,
        out_TO if bias_O is None else bias_O.contiguous(),
        out_TO,
        tokens,
        outputs,
        triton.cdiv(inputs, tiling.block),
        TOKENS=MOST,
        HALF=tiling.half,
        BLOCK=tiling.block,
        STAGES=tiling.stages,
        BIAS=bias_O is not None,
        GATED=gated,
        num_warps=4,
        **overlapped(x_TI.device),
    )
    return out_TO


@gluon.jit(do_not_specialize=["tokens", "steps"])
def _skinny_kernel(
    inputs: tma.tensor_descriptor,
    weights: tma.tensor_descriptor,
    bias_ptr: gl.tensor,
    out_ptr: gl.tensor,
    tokens: gl.tensor,
    outputs: gl.tensor,
    steps: gl.tensor,
    TOKENS: gl.constexpr,
    HALF: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    BIAS: gl.constexpr,
    GATED: gl.constexpr,
    OVERLAP: gl.constexpr,
) -> None:
    release(OVERLAP)
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    row = gl.program_id(0) * (HALF if GATED else 2 * HALF)
    second_row = row + (outputs if GATED else HALF)
    w = gl.allocate_shared_memory(dtype, [2 * STAGES, HALF, BLOCK], weights.layout)
    x = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, BLOCK], inputs.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    barrier()
    wait(OVERLAP)
    for i in gl.static_range(STAGES):
        _ask(inputs, weights, x, w, full, i, i, steps, row, second_row)
    acc = gl.zeros([TOKENS, HALF], gl.float32, SUMS)
    second = gl.zeros([TOKENS, HALF], gl.float32, SUMS)
    for step in range(steps):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        asked = warpgroup_mma(x.index(stage), w.index(2 * stage).permute((1, 0)), acc, is_async=True)
        second_asked = warpgroup_mma(x.index(stage), w.index(2 * stage + 1).permute((1, 0)), second, is_async=True)
        acc, second = warpgroup_mma_wait(0, [asked, second_asked])
        barrier()  # every warp has read the stage
        _ask(inputs, weights, x, w, full, stage, step + STAGES, steps, row, second_row)
    token = gl.expand_dims(gl.arange(0, TOKENS, layout=gl.SliceLayout(1, SUMS)), 1)
    column = row + gl.arange(0, HALF, layout=gl.SliceLayout(0, SUMS))
    second_column = column + (outputs if GATED else HALF)
    if BIAS:
        acc += gl.expand_dims(gl.load(bias_ptr + column, mask=column < outputs, other=0.0).to(gl.float32), 0)
        exists = second_column < (2 * outputs if GATED else outputs)
        second += gl.expand_dims(gl.load(bias_ptr + second_column, mask=exists, other=0.0).to(gl.float32), 0)
    if GATED:
        acc = acc / (1.0 + gl.exp(-acc)) * second
    places = out_ptr + token.to(gl.int64) * outputs + gl.expand_dims(column, 0)
    mask = (token < tokens) & gl.expand_dims(column < outputs, 0)
    gl.store(places, acc.to(dtype), mask=mask)
    if not GATED:
        mask = (token < tokens) & gl.expand_dims(second_column < outputs, 0)
        gl.store(places + HALF, second.to(dtype), mask=mask)


@gluon.jit
def _ask(
    inputs: tma.tensor_descriptor,
    weights: tma.tensor_descriptor,
    x: gl.shared_memory_descriptor,
    w: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    stage: gl.tensor,
    step: gl.tensor,
    steps: gl.tensor,
    row: gl.tensor,
    second_row: gl.tensor,
) -> None:
    """Have a stage filled with a step, if there is one. What lies beyond the matrices comes as zeros."""
    BLOCK: gl.constexpr = inputs.block_type.shape[1]
    SIZE: gl.constexpr = (inputs.block_type.shape[0] + 2 * weights.block_type.shape[0]) * BLOCK * 2
    exists = step < steps
    mbarrier.expect(full.index(stage), SIZE, pred=exists)
    copy(weights, [row, step * BLOCK], full.index(stage), w.index(2 * stage), exists)
    copy(weights, [second_row, step * BLOCK], full.index(stage), w.index(2 * stage + 1), exists)
    copy(inputs, [0, step * BLOCK], full.index(stage), x.index(stage), exists)
