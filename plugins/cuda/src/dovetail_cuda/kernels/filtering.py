"""Scaled logits without the tokens that filters drop."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail.ops.sampling import SamplingTensors, scale_logits
from dovetail_cuda.kernels.floors import find_candidates, floor_among, is_filtered, last_reaching, outer_floor, weight
from dovetail_cuda.kernels.overlap import overlapped, release, wait
from dovetail_cuda.kernels.ranking import CANDIDATES, GROUPS, number, ordered, packed_key, scaled
from dovetail_cuda.kernels.scan import PARAMETERS, scan

BLOCK = 4096

_CANDIDATES = tl.constexpr(CANDIDATES)
_GROUPS = tl.constexpr(GROUPS)
_LOWEST = tl.constexpr(-0x7F800001)
_HIGHEST = tl.constexpr(0x7F800000)


def filter_logits(logits_SV: Tensor, params: SamplingTensors) -> Tensor:
    """See :func:`dovetail.ops.reference.filter_logits`."""
    (rows, width), device = logits_SV.shape, logits_SV.device
    if params.all_greedy or not params.any_filter or not rows:
        return scale_logits(logits_SV, params)
    scanned = scan(logits_SV, params, filtered=True, drawn=False)
    floors_S = torch.empty(rows, dtype=torch.int32, device=device)
    _floor_kernel[(rows,)](
        *scanned.arguments,
        floors_S,
        scanned.best_ST.shape[1],
        TILES=triton.next_power_of_2(scanned.best_ST.shape[1]),
        VECTOR=scanned.vector,
        num_warps=16,
        **overlapped(device),
    )
    out_SV = torch.empty(rows, width, dtype=torch.float32, device=device)
    logits_SV, stride, _, temperature_S = scanned.arguments[:4]
    _drop_kernel[(triton.cdiv(width, BLOCK), rows)](
        logits_SV, stride, width, temperature_S, floors_S, out_SV, BLOCK=BLOCK, num_warps=8, **overlapped(device)
    )
    return out_SV


@triton.jit(do_not_specialize_on_alignment=PARAMETERS)
def _floor_kernel(
    logits_ptr: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    seeds_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    best_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    scratch_ptr: tl.tensor,
    floors_ptr: tl.tensor,
    tiles: tl.tensor,
    TILES: tl.constexpr,
    VECTOR: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    release(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    pairs = tl.load(best_ptr + row * tiles + tile, mask=tile < tiles, other=-0x8000000000000000)
    best = packed_key(tl.max(pairs))
    temperature = tl.load(temperature_ptr + row)
    floor = tl.full((), _LOWEST, tl.int32)
    filtered = (temperature != 0) & is_filtered(row, top_k_ptr, top_p_ptr, min_p_ptr)
    if filtered & (best > _LOWEST) & (best < _HIGHEST):
        largest = number(best)
        sums = tl.load(sums_ptr + row * tiles + tile, mask=tile < tiles, other=0.0)
        heights = tl.where(tile < tiles, number(packed_key(pairs)), float("-inf"))
        total = tl.sum(sums * tl.exp(heights - largest))
        top_k, top_p = tl.load(top_k_ptr + row).to(tl.int32), tl.load(top_p_ptr + row)
        floor = _floor(
            logits_ptr + row * stride,
            width,
            temperature,
            tl.where(top_k < width, top_k, 0),
            top_p,
            largest + tl.log(tl.load(min_p_ptr + row)),
            largest,
            total,
            maxima_ptr + row * tiles * _GROUPS,
            tiles * _GROUPS,
            scratch_ptr + row * (2 * _CANDIDATES),
            TILES * _GROUPS,
            VECTOR,
        )
    tl.store(floors_ptr + row, floor)


@triton.jit
def _floor(
    row_ptr: tl.tensor,
    width: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    lowest: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    maxima_ptr: tl.tensor,
    groups: tl.tensor,
    scratch_ptr: tl.tensor,
    MAXIMA: tl.constexpr,
    VECTOR: tl.constexpr,
) -> tl.tensor:
    limits = (top_k, top_p, lowest, largest, total)
    count = find_candidates(row_ptr, width, temperature, *limits, maxima_ptr, groups, scratch_ptr, MAXIMA, VECTOR)
    if count <= _CANDIDATES:
        rank = tl.arange(0, _CANDIDATES)
        keys = packed_key(tl.load(scratch_ptr + rank, mask=rank < count, other=_LOWEST << 32))
        floor = floor_among(keys, rank < count, number(keys), *limits)
    else:
        floor = outer_floor(row_ptr, width, temperature, top_k, lowest, largest)
        if top_p < 1:
            if floor > _LOWEST:
                total = weight(row_ptr, width, temperature, largest, floor, True)
            floor = last_reaching(row_ptr, width, temperature, largest, floor, top_p * total, True)
    return floor


@triton.jit
def _drop_kernel(
    logits_ptr: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    temperature_ptr: tl.tensor,
    floors_ptr: tl.tensor,
    out_ptr: tl.tensor,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    release(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = scaled(logits_ptr + row * stride, columns, width, tl.where(temperature == 0, 1.0, temperature))
    x = tl.where(ordered(x) < tl.load(floors_ptr + row), float("-inf"), x)
    tl.store(out_ptr + row * width + columns, x, mask=columns < width)
