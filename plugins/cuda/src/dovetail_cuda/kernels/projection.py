"""A layer's projection made ready for attention in one launch: norms of queries and keys, rotation, the KV write.

A program has a few heads of one token: of its queries, which are turned in place, of its keys or of its values, which
go to their page. Every number is rounded where the separate operations round it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail.contracts.attention import AttentionSpec, Preparation
from dovetail_cuda.kernels.cache import saturated
from dovetail_cuda.kernels.overlap import overlapped, release, wait


@dataclass(frozen=True, slots=True)
class HeadTiling:
    """How a launch is cut: heads and warps of a program."""

    heads: int
    warps: int


FEW, MANY = HeadTiling(2, 1), HeadTiling(8, 2)
FEW_TOKENS = 16
"""Up to which many small programs end soonest; beyond, starting them takes longer than what they do."""


def prepare_and_store(
    qkv_TE: Tensor,
    positions_T: Tensor,
    preparation: Preparation,
    spec: AttentionSpec,
    k_cache_BPNK: Tensor,
    v_cache_BPNK: Tensor,
    slot_mapping_T: Tensor,
    tiling: HeadTiling | None = None,
    finite: bool = False,
) -> Tensor:
    """Store keys and values; returns the queries ``[T, H, K]``, a view of the projection.

    See :meth:`dovetail.contracts.attention.Preparation.heads` and :func:`dovetail_cuda.kernels.cache.write_kv`.
    """
    if qkv_TE.stride(1) != 1:
        qkv_TE = qkv_TE.contiguous()
    tokens, table_PK = len(qkv_TE), preparation.cos_sin_PK
    q_THK = qkv_TE[:, : spec.num_heads * spec.head_size].view(tokens, spec.num_heads, spec.head_size)
    if not tokens:
        return q_THK
    tiling = tiling or (FEW if tokens <= FEW_TOKENS else MANY)
    q_weight_K, k_weight_K = preparation.norm_weights_K or (table_PK, table_PK)
    half, is_normed = table_PK.shape[1] // 2, preparation.norm_weights_K is not None
    parts, constants = _cut(
        spec, half, is_normed, tiling, k_cache_BPNK.shape[1], qkv_TE.dtype, k_cache_BPNK.dtype, finite
    )
    _prepare_kernel[(tokens * parts,)](
        qkv_TE,
        positions_T,
        table_PK,
        q_weight_K,
        k_weight_K,
        slot_mapping_T,
        k_cache_BPNK,
        v_cache_BPNK,
        preparation.eps,
        qkv_TE.stride(0),
        positions_T.stride(0),
        table_PK.stride(0),
        slot_mapping_T.stride(0),
        *k_cache_BPNK.stride(),
        *v_cache_BPNK.stride(),
        **constants,
        **overlapped(qkv_TE.device),
    )
    return q_THK


@cache
def _cut(
    spec: AttentionSpec,
    half: int,
    is_normed: bool,
    tiling: HeadTiling,
    page: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    finite: bool,
) -> tuple[int, dict[str, Any]]:
    """Programs per token, and what is fixed for a kind of layer: the host finds it once, not at every launch."""
    heads, kv_heads, size = spec.num_heads, spec.num_kv_heads, spec.head_size
    per_program = min(tiling.heads, triton.next_power_of_2(heads))
    q_parts, kv_parts = triton.cdiv(heads, per_program), triton.cdiv(kv_heads, per_program)
    largest = torch.finfo(kv_dtype).max
    return q_parts + 2 * kv_parts, {
        "Q_HEADS": heads,
        "KV_HEADS": kv_heads,
        "Q_PARTS": q_parts,
        "KV_PARTS": kv_parts,
        "SIZE": size,
        "HALF": half,
        "NORM": is_normed,
        "PAGE": page,
        "LIMIT": largest,
        "SATURATE": finite or largest < torch.finfo(dtype).max,
        "HEADS": per_program,
        "BLOCK": triton.next_power_of_2(size),
        "PAIRS": triton.next_power_of_2(half),
        "REST": triton.next_power_of_2(size - 2 * half) if size > 2 * half else 0,
        "num_warps": tiling.warps,
    }


@triton.jit
def _prepare_kernel(
    qkv_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    table_ptr: tl.tensor,
    q_weight_ptr: tl.tensor,
    k_weight_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    eps: tl.tensor,
    qkv_stride: tl.tensor,
    positions_stride: tl.tensor,
    table_stride: tl.tensor,
    slots_stride: tl.tensor,
    k_stride_b: tl.tensor,
    k_stride_p: tl.tensor,
    k_stride_n: tl.tensor,
    k_stride_k: tl.tensor,
    v_stride_b: tl.tensor,
    v_stride_p: tl.tensor,
    v_stride_n: tl.tensor,
    v_stride_k: tl.tensor,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    Q_PARTS: tl.constexpr,
    KV_PARTS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    PAGE: tl.constexpr,
    LIMIT: tl.constexpr,
    SATURATE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    release(OVERLAP)
    PARTS: tl.constexpr = Q_PARTS + 2 * KV_PARTS
    token, part = (tl.program_id(0) // PARTS).to(tl.int64), tl.program_id(0) % PARTS
    row = qkv_ptr + token * qkv_stride
    rank = tl.arange(0, HEADS)[:, None]
    pairs = tl.arange(0, PAIRS)[None, :]
    angles = table_ptr + tl.load(positions_ptr + token * positions_stride) * table_stride + pairs
    cos = tl.load(angles, mask=pairs < HALF, other=0.0)
    sin = tl.load(angles + HALF, mask=pairs < HALF, other=0.0)
    slot = tl.load(slots_ptr + token * slots_stride)
    wait(OVERLAP)
    if part >= Q_PARTS + KV_PARTS:
        heads = (part - Q_PARTS - KV_PARTS) * HEADS + rank
        dims = tl.arange(0, BLOCK)[None, :]
        mask = (heads < KV_HEADS) & (dims < SIZE)
        v = tl.load(row + (Q_HEADS + KV_HEADS + heads) * SIZE + dims, mask=mask, other=0.0)
        page = v_cache_ptr + (slot // PAGE) * v_stride_b + (slot % PAGE) * v_stride_p + heads * v_stride_n
        tl.store(page + dims * v_stride_k, _stored(v, v_cache_ptr, LIMIT, SATURATE), mask=mask)
        return
    is_key = part >= Q_PARTS
    heads = tl.where(is_key, part - Q_PARTS, part) * HEADS + rank
    exists = heads < tl.where(is_key, KV_HEADS, Q_HEADS)
    source = row + (heads + tl.where(is_key, Q_HEADS, 0)) * SIZE
    rest = 2 * HALF + tl.arange(0, max(REST, 1))[None, :]
    mask, rest_mask = exists & (pairs < HALF), exists & (rest < SIZE)
    first = tl.load(source + pairs, mask=mask, other=0.0)
    second = tl.load(source + HALF + pairs, mask=mask, other=0.0)
    dtype: tl.constexpr = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    if REST:
        others = tl.load(source + rest, mask=rest_mask, other=0.0)
    if NORM:
        weight = tl.where(is_key, k_weight_ptr, q_weight_ptr)
        square = tl.sum(first * first + second * second, axis=1)
        if REST:
            wide = others.to(tl.float32)
            square += tl.sum(wide * wide, axis=1)
        scale = tl.rsqrt(square / SIZE + eps)[:, None]
        first = _normed(first, scale, weight + pairs, pairs < HALF, dtype)
        second = _normed(second, scale, weight + HALF + pairs, pairs < HALF, dtype)
        if REST:
            others = _normed(wide, scale, weight + rest, rest < SIZE, dtype).to(dtype)
    turned = (first * cos - second * sin).to(dtype)
    turned_too = (second * cos + first * sin).to(dtype)
    if is_key:
        page = k_cache_ptr + (slot // PAGE) * k_stride_b + (slot % PAGE) * k_stride_p + heads * k_stride_n
        tl.store(page + pairs * k_stride_k, _stored(turned, k_cache_ptr, LIMIT, SATURATE), mask=mask)
        page_too = page + (HALF + pairs) * k_stride_k
        tl.store(page_too, _stored(turned_too, k_cache_ptr, LIMIT, SATURATE), mask=mask)
        if REST:
            tl.store(page + rest * k_stride_k, _stored(others, k_cache_ptr, LIMIT, SATURATE), mask=rest_mask)
    else:
        tl.store(source + pairs, turned, mask=mask)
        tl.store(source + HALF + pairs, turned_too, mask=mask)
        if REST and NORM:
            tl.store(source + rest, others, mask=rest_mask)


@triton.jit
def _normed(x: tl.tensor, scale: tl.tensor, weights: tl.tensor, mask: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """In float32, with the precision of ``dtype``: the rotation reads what the norm would have written."""
    weight = tl.load(weights, mask=mask, other=0.0).to(tl.float32)
    return (x * scale * weight).to(dtype).to(tl.float32)


@triton.jit
def _stored(x: tl.tensor, cache_ptr: tl.tensor, LIMIT: tl.constexpr, SATURATE: tl.constexpr) -> tl.tensor:
    if SATURATE:
        x = saturated(x, LIMIT)
    return x.to(cache_ptr.dtype.element_ty)
