"""Keys and values into the paged cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def write_kv(
    k_TNK: Tensor,
    v_TNK: Tensor,
    k_cache_BPNK: Tensor,
    v_cache_BPNK: Tensor,
    slot_mapping_T: Tensor,
    finite: bool = False,
) -> None:
    """See :func:`dovetail.ops.reference.write_kv`. What exceeds the cache's dtype becomes its largest number.

    Args:
        finite: infinities do as well, and NaN becomes zero, where the cache has the same dtype.
    """
    tokens, heads, size = k_TNK.shape
    if not tokens:
        return
    largest = torch.finfo(k_cache_BPNK.dtype).max
    _write_kernel[(tokens,)](
        k_TNK,
        v_TNK,
        k_cache_BPNK,
        v_cache_BPNK,
        slot_mapping_T,
        *k_TNK.stride(),
        *v_TNK.stride(),
        *k_cache_BPNK.stride(),
        *v_cache_BPNK.stride(),
        slot_mapping_T.stride(0),
        PAGE=k_cache_BPNK.shape[1],
        NUM_HEADS=heads,
        HEAD_SIZE=size,
        LIMIT=largest,
        SATURATE=finite or largest < torch.finfo(k_TNK.dtype).max,
        HEADS=triton.next_power_of_2(heads),
        BLOCK=triton.next_power_of_2(size),
    )


@triton.jit
def _write_kernel(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    k_stride_t: tl.tensor,
    k_stride_n: tl.tensor,
    k_stride_k: tl.tensor,
    v_stride_t: tl.tensor,
    v_stride_n: tl.tensor,
    v_stride_k: tl.tensor,
    k_cache_stride_b: tl.tensor,
    k_cache_stride_p: tl.tensor,
    k_cache_stride_n: tl.tensor,
    k_cache_stride_k: tl.tensor,
    v_cache_stride_b: tl.tensor,
    v_cache_stride_p: tl.tensor,
    v_cache_stride_n: tl.tensor,
    v_cache_stride_k: tl.tensor,
    slots_stride: tl.tensor,
    PAGE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    LIMIT: tl.constexpr,
    SATURATE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token * slots_stride)
    block, offset = slot // PAGE, slot % PAGE
    heads, dims = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask = (heads < NUM_HEADS) & (dims < HEAD_SIZE)
    k = tl.load(k_ptr + token * k_stride_t + heads * k_stride_n + dims * k_stride_k, mask=mask, other=0.0)
    v = tl.load(v_ptr + token * v_stride_t + heads * v_stride_n + dims * v_stride_k, mask=mask, other=0.0)
    if SATURATE:
        k, v = saturated(k, LIMIT), saturated(v, LIMIT)
    k_place = k_cache_ptr + block * k_cache_stride_b + offset * k_cache_stride_p
    v_place = v_cache_ptr + block * v_cache_stride_b + offset * v_cache_stride_p
    k_place += heads * k_cache_stride_n + dims * k_cache_stride_k
    v_place += heads * v_cache_stride_n + dims * v_cache_stride_k
    tl.store(k_place, k.to(k_cache_ptr.dtype.element_ty), mask=mask)
    tl.store(v_place, v.to(v_cache_ptr.dtype.element_ty), mask=mask)


@triton.jit
def saturated(x: tl.tensor, LIMIT: tl.constexpr) -> tl.tensor:
    """In float32, finite."""
    x = x.to(tl.float32)
    return tl.clamp(tl.where(x == x, x, 0.0), -LIMIT, LIMIT)
