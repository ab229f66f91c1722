"""Products of many wide rows with weights of 8 or 4 bits on Hopper, at about the speed of a product without widening.

One warp copies codes and activations into shared memory, two groups of four warps compute 64 outputs each. A group
widens its codes of the next step while its tensor cores work on this one, and hands them over in registers, so that
wide weights are in no memory. Programs stay on their multiprocessor and walk through the tiles, and the copying warp
runs ahead into the next one.
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

from dovetail_cuda.kernels.narrow import Codes
from dovetail_cuda.kernels.prompts import copy
from dovetail_cuda.kernels.widen import FP8_TO_BF16, INT8_TO_BF16, INT8_TO_FP16, PAIRS_TO_FP16, SCALED_PAIR_TO_BF16

OUTPUTS: gl.constexpr = gl.constexpr(64)
"""Of a group of warps."""
INPUTS: gl.constexpr = gl.constexpr(64)
"""Of a step: what the copy engine swizzles together."""
_TOGETHER: gl.constexpr = gl.constexpr(8)
"""Tiles of outputs that are worked on side by side, so that they share activations in the cache."""
_STAGES = {128: 6, 256: 4}
"""Steps that are copied ahead, by a tile's tokens: what shared memory has room for."""


def many_rows_product(x_TI: Tensor, codes: Codes, bias_O: Tensor | None, processors: int, rows: int) -> Tensor:
    """``x @ weightᵀ + bias``: ``[T, O]`` in the dtype of ``x``, float16 or bfloat16.

    Args:
        x_TI: rows begin at multiples of 16 bytes, and inputs lie side by side.
        codes: ordinary weights whose rows begin at multiples of 16 bytes, in groups of a multiple of 64 inputs.
        rows: of a tile: 128 or 256.
    """
    (outputs, inputs), tokens = codes.shape, len(x_TI)
    out_TO = torch.empty((tokens, outputs), dtype=x_TI.dtype, device=x_TI.device)
    is_fp8 = codes.weight.dtype == torch.float8_e4m3fn
    weight = codes.weight.view(torch.uint8) if is_fp8 else codes.weight
    pairs = codes.weight.dtype == torch.uint8
    zero_OG = codes.scale_OG if codes.zero_OG is None else codes.zero_OG
    tiles_o, tiles_t = triton.cdiv(outputs, 2 * OUTPUTS.value), triton.cdiv(tokens, rows)
    _many_rows_kernel[(min(tiles_o * tiles_t, processors),)](
        described(weight, OUTPUTS.value, INPUTS.value // (2 if pairs else 1)),
        described(x_TI, rows, INPUTS.value),
        codes.scale_OG,
        zero_OG,
        out_TO if bias_O is None else bias_O,
        out_TO,
        tokens,
        outputs,
        inputs,
        codes.group_size,
        *codes.scale_OG.stride(),
        *zero_OG.stride(),
        tiles_o,
        tiles_t,
        PAIRS=pairs,
        FP8=is_fp8,
        GROUPED=codes.group_size < inputs or codes.zero_OG is not None,
        ZEROS=codes.zero_OG is not None,
        BIAS=bias_O is not None,
        ROWS=rows,
        STAGES=_STAGES[rows],
        num_warps=4,
    )
    return out_TO


def described(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """For the copy engine, which takes tiles of this size from the matrix."""
    bits = 8 * matrix.element_size()
    layout = gl.NVMMASharedLayout(swizzle_byte_width=columns * bits // 8, element_bitwidth=bits, rank=2)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns], layout)


@gluon.jit(do_not_specialize=["tokens", "tiles_o", "tiles_t"])
def _many_rows_kernel(
    codes: tma.tensor_descriptor,
    activations: tma.tensor_descriptor,
    scale_ptr: gl.tensor,
    zero_ptr: gl.tensor,
    bias_ptr: gl.tensor,
    out_ptr: gl.tensor,
    tokens: gl.tensor,
    outputs: gl.tensor,
    inputs: gl.tensor,
    group_size: gl.tensor,
    scale_stride_o: gl.tensor,
    scale_stride_g: gl.tensor,
    zero_stride_o: gl.tensor,
    zero_stride_g: gl.tensor,
    tiles_o: gl.tensor,
    tiles_t: gl.tensor,
    PAIRS: gl.constexpr,
    FP8: gl.constexpr,
    GROUPED: gl.constexpr,
    ZEROS: gl.constexpr,
    BIAS: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
) -> None:
    STORED: gl.constexpr = INPUTS // 2 if PAIRS else INPUTS
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    w = gl.allocate_shared_memory(codes.dtype, [2 * STAGES, OUTPUTS, STORED], codes.layout)
    x = gl.allocate_shared_memory(activations.dtype, [STAGES, ROWS, INPUTS], activations.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    fence_async_shared()
    slots = (w, x, full, free)
    scales = (scale_ptr, scale_stride_o, scale_stride_g, zero_ptr, zero_stride_o, zero_stride_g)
    sizes = (tokens, outputs, inputs, group_size, tiles_o, tiles_t)
    gl.warp_specialize(
        [
            (_compute, (slots, scales, bias_ptr, out_ptr, sizes, 0, PAIRS, FP8, GROUPED, ZEROS, BIAS, ROWS, STAGES)),
            (_compute, (slots, scales, bias_ptr, out_ptr, sizes, 1, PAIRS, FP8, GROUPED, ZEROS, BIAS, ROWS, STAGES)),
            (_fetch, (slots, codes, activations, sizes, STORED, ROWS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _place(tile: gl.tensor, tiles_o: gl.tensor, tiles_t: gl.tensor) -> tuple[gl.tensor, gl.tensor]:
    """Which outputs and which rows a tile has, as a number of tiles."""
    first_o = tile // (_TOGETHER * tiles_t) * _TOGETHER
    together = gl.minimum(tiles_o - first_o, _TOGETHER)
    within = tile % (_TOGETHER * tiles_t)
    return first_o + within % together, within // together


@gluon.jit
def _fetch(
    slots: gl.tuple,
    codes: tma.tensor_descriptor,
    activations: tma.tensor_descriptor,
    sizes: gl.tuple,
    STORED: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """The copying warp. What lies beyond the matrices is read as zeros."""
    w, x, full, free = slots
    _, _, inputs, _, tiles_o, tiles_t = sizes
    count = 0
    for tile in range(gl.program_id(0), tiles_o * tiles_t, gl.num_programs(0)):
        tile_o, tile_t = _place(tile, tiles_o, tiles_t)
        for step in range((inputs + INPUTS - 1) // INPUTS):
            stage = count % STAGES
            mbarrier.wait(free.index(stage), ((count // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), 2 * OUTPUTS * STORED + 2 * ROWS * INPUTS)
            for half in gl.static_range(2):
                place = [(2 * tile_o + half) * OUTPUTS, step * STORED]
                copy(codes, place, full.index(stage), w.index(2 * stage + half))
            copy(activations, [tile_t * ROWS, step * INPUTS], full.index(stage), x.index(stage))
            count += 1


@gluon.jit
def _compute(
    slots: gl.tuple,
    scales: gl.tuple,
    bias_ptr: gl.tensor,
    out_ptr: gl.tensor,
    sizes: gl.tuple,
    HALF: gl.constexpr,
    PAIRS: gl.constexpr,
    FP8: gl.constexpr,
    GROUPED: gl.constexpr,
    ZEROS: gl.constexpr,
    BIAS: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """Four warps, which compute one half of the outputs."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    WIDE: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    STORED: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    w, x, full, free = slots
    scale_ptr, scale_stride_o, scale_stride_g, zero_ptr, zero_stride_o, zero_stride_g = scales
    tokens, outputs, inputs, group_size, tiles_o, tiles_t = sizes
    steps = (inputs + INPUTS - 1) // INPUTS
    count = 0
    for tile in range(gl.program_id(0), tiles_o * tiles_t, gl.num_programs(0)):
        tile_o, tile_t = _place(tile, tiles_o, tiles_t)
        first_o = (2 * tile_o + HALF) * OUTPUTS
        # what lies outside reads the last output, and is not stored
        own = gl.minimum(first_o + gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, WIDE)), outputs - 1)
        own_scale, own_zero = scale_ptr + own * scale_stride_o, zero_ptr + own * zero_stride_o
        scale, zero = _loaded(own_scale, own_zero, GROUPED, ZEROS)
        acc = gl.zeros([OUTPUTS, ROWS], gl.float32, SUMS)
        mbarrier.wait(full.index(count % STAGES), (count // STAGES) & 1)
        slot = w.index(2 * (count % STAGES) + HALF)
        wide = _widened(slot, scale, zero, PAIRS, FP8, GROUPED, ZEROS, dtype, SUMS)
        for step in range(1, steps):
            stage, following = count % STAGES, (count + 1) % STAGES
            asked = warpgroup_mma(wide, x.index(stage).permute((1, 0)), acc, is_async=True)
            group = step * INPUTS // group_size
            scale, zero = _loaded(own_scale + group * scale_stride_g, own_zero + group * zero_stride_g, GROUPED, ZEROS)
            mbarrier.wait(full.index(following), ((count + 1) // STAGES) & 1)
            slot = w.index(2 * following + HALF)
            next_wide = _widened(slot, scale, zero, PAIRS, FP8, GROUPED, ZEROS, dtype, SUMS)
            acc, _ = warpgroup_mma_wait(0, [asked, wide])  # registers that are read until here stay as they are
            mbarrier.arrive(free.index(stage), count=1)
            wide = next_wide
            count += 1
        asked = warpgroup_mma(wide, x.index(count % STAGES).permute((1, 0)), acc, is_async=True)
        acc, _ = warpgroup_mma_wait(0, [asked, wide])
        mbarrier.arrive(free.index(count % STAGES), count=1)
        count += 1
        rows_o = gl.minimum(first_o + gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, SUMS)), outputs - 1)
        if not GROUPED:
            acc = acc * gl.expand_dims(gl.load(scale_ptr + rows_o * scale_stride_o).to(gl.float32), 1)
        if BIAS:
            acc = acc + gl.expand_dims(gl.load(bias_ptr + rows_o).to(gl.float32), 1)
        out = gl.convert_layout(acc.to(dtype), STORED)
        o = first_o + gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, STORED))
        t = tile_t * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(0, STORED))
        places = gl.expand_dims(t.to(gl.int64) * outputs, 0) + gl.expand_dims(o, 1)
        gl.store(out_ptr + places, out, mask=gl.expand_dims(o < outputs, 1) & gl.expand_dims(t < tokens, 0))


@gluon.jit
def _loaded(
    scale_ptrs: gl.tensor, zero_ptrs: gl.tensor, GROUPED: gl.constexpr, ZEROS: gl.constexpr
) -> tuple[gl.tensor, gl.tensor]:
    """What a step's values are scaled by, and their zero points; anything of the kind where there are none."""
    scale = gl.full(scale_ptrs.shape, 1.0, gl.float32, scale_ptrs.type.layout)
    zero = scale
    if GROUPED:
        scale = gl.load(scale_ptrs).to(gl.float32)
    if ZEROS:
        zero = gl.load(zero_ptrs).to(gl.float32)
    return scale, zero


@gluon.jit
def _widened(
    slot: gl.shared_memory_descriptor,
    scale: gl.tensor,
    zero: gl.tensor,
    PAIRS: gl.constexpr,
    FP8: gl.constexpr,
    GROUPED: gl.constexpr,
    ZEROS: gl.constexpr,
    dtype: gl.constexpr,
    SUMS: gl.constexpr,
) -> gl.tensor:
    """A step's weights, where the tensor cores read them; without scales if all inputs share them."""
    WIDE: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    middle: gl.constexpr = 8.0 if PAIRS else 0.0
    if PAIRS and dtype == gl.bfloat16:
        PAIRED: gl.constexpr = gl.DotOperandLayout(0, SUMS, 1)
        high = scale.to(gl.bfloat16)
        low = scale - high.to(gl.float32)
        stored = slot.load(PAIRED).to(gl.int32)
        offset = middle - zero if ZEROS else gl.zeros_like(scale)
        first, second = gl.inline_asm_elementwise(
            SCALED_PAIR_TO_BF16,
            "=h,=h,r,r,r,r",
            [stored, _twice(offset, PAIRED), _twice(high, PAIRED), _twice(low, PAIRED)],
            (gl.int16, gl.int16),
            True,
            1,
        )
        both = gl.join(first, second).reshape([OUTPUTS, INPUTS])
        values = gl.convert_layout(both.to(gl.bfloat16, bitcast=True), WIDE)
    else:
        values = _exact(slot, PAIRS, FP8, dtype, SUMS)
        if GROUPED:
            exact = values.to(gl.float32)
            if ZEROS:
                exact += gl.expand_dims(middle - zero, 1)
            values = (exact * gl.expand_dims(scale, 1)).to(dtype)
    return values


@gluon.jit
def _exact(
    slot: gl.shared_memory_descriptor,
    PAIRS: gl.constexpr,
    FP8: gl.constexpr,
    dtype: gl.constexpr,
    SUMS: gl.constexpr,
) -> gl.tensor:
    """A step's values as wide numbers; of pairs, less 8, in float16."""
    WIDE: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    if PAIRS:
        stored = slot.load(gl.DotOperandLayout(0, SUMS, 1))
        low, high = gl.inline_asm_elementwise(
            PAIRS_TO_FP16, "=r,=r,=r,=r,r", [stored], (gl.float16, gl.float16), True, 4
        )
        values = gl.convert_layout(gl.join(low, high).reshape([OUTPUTS, INPUTS]), WIDE)
    elif FP8 and dtype == gl.bfloat16:
        values = gl.inline_asm_elementwise(FP8_TO_BF16, "=r,=r,r", [slot.load(WIDE)], gl.bfloat16, True, 4)
    elif FP8:
        values = gl.cast(slot.load(WIDE), gl.float8e4nv, bitcast=True).to(gl.float16)
    elif dtype == gl.bfloat16:
        values = gl.inline_asm_elementwise(INT8_TO_BF16, "=r,=r,r", [slot.load(WIDE)], gl.bfloat16, True, 4)
    else:
        values = gl.inline_asm_elementwise(INT8_TO_FP16, "=r,=r,r", [slot.load(WIDE)], gl.float16, True, 4)
    return values


@gluon.jit
def _twice(rows: gl.tensor, LAYOUT: gl.constexpr) -> gl.tensor:
    """Each row's bfloat16 number in both halves of an int32, for all columns of a layout."""
    bits = rows.to(gl.bfloat16).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return gl.expand_dims(gl.convert_layout(bits | (bits << 16), gl.SliceLayout(1, LAYOUT)), 1)
