"""Products with weights of 8 or 4 bits, and such weights as wide ones.

Few tokens are bound by the bytes of the weight: it streams through the tensor cores as their left operand, so that a
tile is as narrow as the tokens are few, and programs share the inputs of a tile where there are not enough outputs for
all of the chip. The last of them adds up the parts in their order, so that results repeat bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail_cuda.kernels.counters import counters
from dovetail_cuda.kernels.overlap import overlapped, release, wait
from dovetail_cuda.kernels.segments import segment_of
from dovetail_cuda.kernels.widen import widen, widen_pairs

LOCKS = 4096
"""Tiles that may be shared, at most."""
_WARPS = 6
"""That each multiprocessor should have, if inputs can be shared among programs to get there."""
_TOGETHER = 8
"""Tiles of outputs that are worked on side by side, so that they share activations in the cache."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut.

    Attributes:
        tokens, outputs, inputs: of a program's tile, and of one step along the inputs.
        splits: programs that share the inputs of a tile.
        warps, stages: of a program.
    """

    tokens: int
    outputs: int
    inputs: int
    splits: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Codes:
    """A quantized weight: element ``[o, i]`` is ``(value[o, i] - zero[o, g]) × scale[o, g]``, where ``g`` is
    ``i // group_size``. Those of experts have a dimension in front.

    Attributes:
        weight: int8 or fp8 ``[O, I]``; or uint8 ``[O, I / 2]``, two values each, the low half first. Contiguous.
        scale_OG: any float dtype and strides.
        zero_OG: as ``scale_OG``; None means 8 for pairs, and 0 for others.
        group_size: inputs that share a scale; all of them, or a multiple of 32.
    """

    weight: Tensor
    scale_OG: Tensor
    zero_OG: Tensor | None
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        outputs, stored = self.weight.shape[-2:]
        return outputs, stored * (2 if self.weight.dtype == torch.uint8 else 1)


def product(
    x_TI: Tensor,
    codes: Codes,
    x_scale_TG: Tensor | None,
    bias_O: Tensor | None,
    out_dtype: torch.dtype,
    *,
    starts_E1: Tensor | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """``x @ weightᵀ + bias``: ``[T, O]`` in ``out_dtype``.

    Args:
        x_TI: wide activations, which the weight is widened for; or activations in the dtype of the weight.
        x_scale_TG: of activations in 8 bits, in the groups of the weight; None for wide ones.
        starts_E1: the rows of ``x`` that each expert has, if the weight is one of experts.
    """
    (outputs, inputs), tokens = codes.shape, len(x_TI)
    experts = 0 if starts_E1 is None else len(starts_E1) - 1
    out_TO = torch.empty((tokens, outputs), dtype=out_dtype, device=x_TI.device)
    if not out_TO.numel():
        return out_TO
    x = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
    if tiling is None:
        tiling = tile(tokens, experts, codes, x.dtype, multiprocessors(x.device))
    tiles_t = tokens // tiling.tokens + experts if experts else triton.cdiv(tokens, tiling.tokens)
    tiles = triton.cdiv(outputs, tiling.outputs) * tiles_t
    shared = tiling.splits > 1
    partial_STO = torch.empty((tiling.splits, *out_TO.shape), device=x.device) if shared else out_TO
    x_scale_TG = codes.scale_OG if x_scale_TG is None else x_scale_TG
    zero_OG = codes.scale_OG if codes.zero_OG is None else codes.zero_OG
    _product_kernel[(tiles, tiling.splits)](
        x,
        codes.weight,
        codes.scale_OG,
        zero_OG,
        x_scale_TG,
        out_TO if bias_O is None else bias_O,
        out_TO,
        partial_STO,
        counters(x.device, LOCKS) if shared else out_TO,
        out_TO if starts_E1 is None else starts_E1,
        experts,
        tiles_t,
        tokens,
        outputs,
        inputs,
        codes.group_size,
        tiling.splits,
        x.stride(0),
        codes.weight.stride(0) if experts else 0,
        *_strides(codes.scale_OG),
        *_strides(zero_OG),
        *x_scale_TG.stride()[-2:],
        EXPERTS=experts > 0,
        PAIRS=codes.weight.dtype == torch.uint8,
        WIDEN=x.dtype != codes.weight.dtype,
        GROUPED=codes.group_size < inputs,
        ZEROS=codes.zero_OG is not None,
        BIAS=bias_O is not None,
        SHARED=shared,
        EVEN=inputs % tiling.inputs == 0,
        BLOCK_T=tiling.tokens,
        BLOCK_O=tiling.outputs,
        BLOCK_K=tiling.inputs,
        TOGETHER=_TOGETHER,
        STAGES=tiling.stages,
        COMPILED=x.is_cuda,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        **overlapped(x.device),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return out_TO


def tile(tokens: int, experts: int, codes: Codes, dtype: torch.dtype, multiprocessors: int) -> Tiling:
    """The tiling that measured best.

    Args:
        experts: that share the tokens; 0 for an ordinary weight.
        dtype: of the activations.
    """
    outputs, inputs = codes.shape
    grouped = codes.group_size < inputs
    step = min(128, codes.group_size & -codes.group_size) if grouped else 128
    if dtype == torch.float32:
        return Tiling(tokens=16, outputs=32, inputs=32, splits=1, warps=4, stages=2)
    each = max(1, tokens // experts) if experts else tokens
    most = 1 if experts else max(1, inputs // step // 4)
    if each > 64:
        return _many(each, outputs, step, most, multiprocessors, narrow=dtype == codes.weight.dtype)
    narrow, width = dtype == codes.weight.dtype, max(8, triton.next_power_of_2(each))
    height, warps, stages = {8: (64, 4, 4), 16: (32, 2, 4), 32: (32, 4, 5), 64: (64, 4, 4)}[width]
    if codes.weight.dtype == torch.uint8 and width == 8:
        height = 128
    elif narrow and grouped and width == 16:
        height, warps = 64, 4
    elif narrow and not grouped and width <= 16:
        step, stages = 256, 3
    splits, programs = 1, triton.cdiv(outputs, height)
    while programs * splits * warps < _WARPS * multiprocessors and 2 * splits <= min(8, most):
        splits *= 2
    if width == 32 and splits == 1:
        stages = 3
    return Tiling(tokens=width, outputs=height, inputs=step, splits=splits, warps=warps, stages=stages)


def _many(tokens: int, outputs: int, step: int, most: int, multiprocessors: int, *, narrow: bool) -> Tiling:
    """The same for a tile of 128 tokens."""
    programs = triton.cdiv(outputs, 64) * triton.cdiv(tokens, 128)
    if narrow and programs >= 4 * multiprocessors:
        return Tiling(tokens=128, outputs=128, inputs=step, splits=1, warps=8, stages=3)
    splits = 1
    while 2 * programs * splits <= multiprocessors and 2 * splits <= most:
        splits *= 2
    stages = 4 if narrow or programs * splits <= multiprocessors else 3
    return Tiling(tokens=128, outputs=64, inputs=step, splits=splits, warps=4, stages=stages)


def wide(codes: Codes, dtype: torch.dtype) -> Tensor:
    """The weight ``[O, I]`` in ``dtype``, each element rounded once."""
    outputs, inputs = codes.shape
    out_OI = torch.empty((outputs, inputs), dtype=dtype, device=codes.weight.device)
    zero_OG = codes.scale_OG if codes.zero_OG is None else codes.zero_OG
    grouped = codes.group_size < inputs
    rows, columns = (32, min(128, codes.group_size & -codes.group_size)) if grouped else (16, 512)
    _wide_kernel[(triton.cdiv(outputs, rows), triton.cdiv(inputs, columns))](
        codes.weight,
        codes.scale_OG,
        zero_OG,
        out_OI,
        outputs,
        inputs,
        codes.group_size,
        *codes.scale_OG.stride(),
        *zero_OG.stride(),
        PAIRS=codes.weight.dtype == torch.uint8,
        ZEROS=codes.zero_OG is not None,
        EVEN=inputs % columns == 0,
        BLOCK_O=rows,
        BLOCK_K=columns,
        COMPILED=out_OI.is_cuda,
        **overlapped(out_OI.device),
    )
    return out_OI


def _strides(grid: Tensor) -> tuple[int, ...]:
    """Between experts, outputs and groups."""
    return grid.stride() if grid.dim() == 3 else (0, *grid.stride())


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """That the device has; 1 where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _values(
    weight_places: tl.tensor,
    mask: tl.tensor,
    dtype: tl.constexpr,
    PAIRS: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPILED: tl.constexpr,
) -> tl.tensor:
    """A tile of the weight in ``dtype``; of pairs, less 8."""
    if MASKED:
        codes = tl.load(weight_places, mask=mask, other=0.0)
    else:
        codes = tl.load(weight_places, eviction_policy="evict_first")
    if PAIRS:
        low, high = widen_pairs(codes, dtype, COMPILED)
        values = tl.join(low, high).reshape(ROWS, COLUMNS)
    elif codes.dtype == dtype:
        values = codes
    else:
        values = widen(codes, dtype, COMPILED)
    return values


@triton.jit(do_not_specialize=["experts", "tiles_t", "tokens", "splits"])
def _product_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    locks_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    experts: tl.tensor,
    tiles_t: tl.tensor,
    tokens: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    group_size: tl.tensor,
    splits: tl.tensor,
    x_stride_t: tl.tensor,
    weight_stride_e: tl.tensor,
    scale_stride_e: tl.tensor,
    scale_stride_o: tl.tensor,
    scale_stride_g: tl.tensor,
    zero_stride_e: tl.tensor,
    zero_stride_o: tl.tensor,
    zero_stride_g: tl.tensor,
    x_scale_stride_t: tl.tensor,
    x_scale_stride_g: tl.tensor,
    EXPERTS: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDEN: tl.constexpr,
    GROUPED: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    SHARED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TOGETHER: tl.constexpr,
    STAGES: tl.constexpr,
    COMPILED: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    release(OVERLAP)
    wait(OVERLAP)
    tile, split = tl.program_id(0), tl.program_id(1)
    first_o = tile // (TOGETHER * tiles_t) * TOGETHER
    together = min(tl.cdiv(outputs, BLOCK_O) - first_o, TOGETHER)
    within = tile % (TOGETHER * tiles_t)
    o = (first_o + within % together) * BLOCK_O + tl.arange(0, BLOCK_O)
    begin, end = within // together * BLOCK_T, tokens
    if EXPERTS:
        expert = segment_of(within // together, starts_ptr, 1, experts, BLOCK_T)
        start, end = tl.load(starts_ptr + expert), tl.load(starts_ptr + expert + 1)
        begin = start + begin - (start // BLOCK_T + expert) * BLOCK_T
        if begin >= end:
            return
        weight_ptr += expert.to(tl.int64) * weight_stride_e
        scale_ptr += expert.to(tl.int64) * scale_stride_e
        zero_ptr += expert.to(tl.int64) * zero_stride_e
    t = begin + tl.arange(0, BLOCK_T)
    # what lies outside reads the last output or token, and is not stored
    own_o, own_t = tl.minimum(o, outputs - 1), tl.minimum(t, end - 1)
    PACKED: tl.constexpr = 2 if PAIRS else 1
    k = tl.arange(0, BLOCK_K)
    stored = tl.arange(0, BLOCK_K // PACKED)
    weight_rows = weight_ptr + own_o[:, None].to(tl.int64) * (inputs // PACKED)
    x_columns = x_ptr + own_t[None, :].to(tl.int64) * x_stride_t
    scale_ptr += own_o * scale_stride_o
    zero_ptr += own_o * zero_stride_o
    x_scale_ptr += own_t * x_scale_stride_t
    ACC: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32
    # A wide product of a warp group reads registers while it runs. Scaled in every step, it has ended before they are
    # written again; Triton 3.6 does not see to that where products follow one another in one sum.
    EARLY: tl.constexpr = WIDEN and not GROUPED and BLOCK_T >= 64
    TOTAL: tl.constexpr = tl.float32 if GROUPED or EARLY else ACC
    acc = tl.zeros([BLOCK_O, BLOCK_T], dtype=TOTAL)
    if EARLY:
        row_scale = tl.load(scale_ptr).to(tl.float32)
    steps = tl.cdiv(inputs, BLOCK_K)
    for step in tl.range(steps * split // splits, steps * (split + 1) // splits, num_stages=STAGES):
        at, places = step * BLOCK_K + k[:, None], step * (BLOCK_K // PACKED) + stored[None, :]
        x = tl.load(x_columns + at) if EVEN else tl.load(x_columns + at, mask=at < inputs, other=0.0)
        weight = _values(
            weight_rows + places, places < inputs // PACKED, x.dtype, PAIRS, not EVEN, BLOCK_O, BLOCK_K, COMPILED
        )
        group = step * BLOCK_K // group_size
        if ZEROS:
            middle = 8.0 if PAIRS else 0.0
            weight += (middle - tl.load(zero_ptr + group * zero_stride_g).to(tl.float32)).to(x.dtype)[:, None]
        if GROUPED:
            part = tl.dot(weight, x, input_precision=PRECISION, out_dtype=ACC).to(tl.float32)
            part *= tl.load(scale_ptr + group * scale_stride_g).to(tl.float32)[:, None]
            if not WIDEN:
                part *= tl.load(x_scale_ptr + group * x_scale_stride_g)[None, :]
            acc += part
        elif EARLY:
            acc += tl.dot(weight, x, input_precision=PRECISION) * row_scale[:, None]
        else:
            acc = tl.dot(weight, x, acc, input_precision=PRECISION, out_dtype=ACC)
    mask = (o < outputs)[:, None] & (t < end)[None, :]
    targets = t[None, :].to(tl.int64) * outputs + o[:, None]
    result = acc.to(tl.float32)
    if SHARED:
        size = tokens.to(tl.int64) * outputs
        tl.store(partial_ptr + split * size + targets, result, mask=mask)
        tl.debug_barrier()  # all of this program's threads have stored before its arrival is seen
        if tl.atomic_add(locks_ptr + tile, 1, sem="acq_rel") != splits - 1:
            return
        tl.store(locks_ptr + tile, 0)
        result = tl.zeros([BLOCK_O, BLOCK_T], dtype=tl.float32)
        for other in range(splits):
            result += tl.load(partial_ptr + other * size + targets, mask=mask, other=0.0, cache_modifier=".cg")
    if not GROUPED and not EARLY:
        result *= tl.load(scale_ptr).to(tl.float32)[:, None]
        if not WIDEN:
            result *= tl.load(x_scale_ptr)[None, :]
    if BIAS:
        result += tl.load(bias_ptr + own_o).to(tl.float32)[:, None]
    tl.store(out_ptr + targets, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _wide_kernel(
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    out_ptr: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    group_size: tl.tensor,
    scale_stride_o: tl.tensor,
    scale_stride_g: tl.tensor,
    zero_stride_o: tl.tensor,
    zero_stride_g: tl.tensor,
    PAIRS: tl.constexpr,
    ZEROS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COMPILED: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    release(OVERLAP)
    wait(OVERLAP)
    first = tl.program_id(1) * BLOCK_K
    group = first // group_size  # that of the whole tile
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    own = tl.minimum(o, outputs - 1)
    PACKED: tl.constexpr = 2 if PAIRS else 1
    k = first + tl.arange(0, BLOCK_K)[None, :]
    stored = first // PACKED + tl.arange(0, BLOCK_K // PACKED)[None, :]
    row = inputs // PACKED
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    places = weight_ptr + own[:, None].to(tl.int64) * row + stored
    values = _values(places, stored < row, dtype, PAIRS, not EVEN, BLOCK_O, BLOCK_K, COMPILED).to(tl.float32)
    if ZEROS:
        middle = 8.0 if PAIRS else 0.0
        values += (middle - tl.load(zero_ptr + own * zero_stride_o + group * zero_stride_g).to(tl.float32))[:, None]
    values *= tl.load(scale_ptr + own * scale_stride_o + group * scale_stride_g).to(tl.float32)[:, None]
    mask = (o < outputs)[:, None] & (k < inputs)
    tl.store(out_ptr + o[:, None].to(tl.int64) * inputs + k, values.to(dtype), mask=mask)
