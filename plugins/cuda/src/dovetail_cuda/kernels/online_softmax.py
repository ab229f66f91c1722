"""Steps of the online softmax over pages of keys and values (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al.
2022, arXiv:2205.14135), and joining what several programs found (Dao et al. 2023, flash decoding).

The state of a row is its best score so far, the sum of weights relative to it, and the values weighted so.
"""

from __future__ import annotations

import triton
import triton.language as tl

UNROLLED: tl.constexpr = tl.constexpr(4)
"""Parts that are loaded together."""


@triton.jit
def step(
    acc: tl.tensor,
    best: tl.tensor,
    total: tl.tensor,
    q: tl.tensor,
    k_head: tl.tensor,
    v_head: tl.tensor,
    table: tl.tensor,
    key: tl.tensor,
    position: tl.tensor,
    first: tl.tensor,
    stop: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    dims: tl.tensor,
    k_stride_b: tl.tensor,
    k_stride_p: tl.tensor,
    k_stride_k: tl.tensor,
    v_stride_b: tl.tensor,
    v_stride_p: tl.tensor,
    v_stride_k: tl.tensor,
    table_stride_b: tl.tensor,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One step of the online softmax: ``KEYS`` keys from ``key`` on."""
    keys = key + tl.arange(0, KEYS)
    if MASKED:
        # Others may lie in blocks that hold anything; a weight of 0 would not hide infinities and NaN.
        exists = (keys >= first) & (keys < stop)
        blocks = tl.load(table + keys // PAGE * table_stride_b, mask=exists, other=0).to(tl.int64)
        v_mask = exists[:, None] & (dims < SIZE)[None, :]
        k_mask = exists[None, :] & (dims < SIZE)[:, None]
    else:
        blocks = tl.load(table + keys // PAGE * table_stride_b).to(tl.int64)
        v_mask = tl.full([KEYS, 1], True, tl.int1) & (dims < SIZE)[None, :]
        k_mask = tl.full([1, KEYS], True, tl.int1) & (dims < SIZE)[:, None]
    k_places = k_head + blocks * k_stride_b + keys % PAGE * k_stride_p
    v_places = v_head + blocks * v_stride_b + keys % PAGE * v_stride_p
    if MASKED or SIZE < BLOCK:
        k = tl.load(k_places[None, :] + dims[:, None] * k_stride_k, mask=k_mask, other=0.0)
        v = tl.load(v_places[:, None] + dims[None, :] * v_stride_k, mask=v_mask, other=0.0)
    else:
        k = tl.load(k_places[None, :] + dims[:, None] * k_stride_k)
        v = tl.load(v_places[:, None] + dims[None, :] * v_stride_k)
    scores = tl.dot(q, k.to(q.dtype), input_precision=PRECISION) * scale
    if CAPPED:
        fallen = tl.exp(-2.0 * tl.abs(scores))
        scores = tl.where(scores < 0, -cap, cap) * (1.0 - fallen) / (1.0 + fallen)  # cap × tanh
    if MASKED:
        visible = exists[None, :] & (keys[None, :] <= position[:, None])
        if WINDOW:
            visible &= keys[None, :] > position[:, None] - WINDOW
        scores = tl.where(visible, scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, axis=1))
    # a row that has seen no key yet has nothing to scale
    shift = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(best - shift)
    total = total * fade + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * fade[:, None], input_precision=PRECISION)
    return acc, new_best, total


@triton.jit
def join(
    parts_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    row_places: tl.tensor,
    dims: tl.tensor,
    row_mask: tl.tensor,
    parts: tl.tensor,
    stride: tl.tensor,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The state of an online softmax over ``parts``, which are normalised and have their sums as logarithms."""
    acc = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    best = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    part_places = row_places[:, None] * SIZE + dims[None, :]
    for first in range(0, parts, UNROLLED):
        for i in tl.static_range(UNROLLED):  # so that their loads do not wait for each other
            part = first + i
            exists = row_mask & (tl.full([ROWS], part, tl.int32) < parts)
            sums = tl.load(
                sums_ptr + part * stride + row_places, mask=exists, other=float("-inf"), cache_modifier=".cg"
            )
            values = tl.load(
                parts_ptr + part * stride * SIZE + part_places,
                mask=exists[:, None] & (dims < SIZE)[None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            new_best = tl.maximum(best, sums)
            shift = tl.where(new_best == float("-inf"), 0.0, new_best)
            weight, fade = tl.exp2(sums - shift), tl.exp2(best - shift)
            acc = acc * fade[:, None] + values * weight[:, None]
            total = total * fade + weight
            best = new_best
    return acc, best, total
