"""The experts of each token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail_cuda.kernels.overlap import overlapped, release, wait

ELEMENTS = 1024
"""Logits of a program that takes several tokens."""
MANY = 1024
"""Tokens beyond which programs do."""


def choose_experts(logits_TE: Tensor, num_active: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """See :func:`dovetail.ops.reference.choose_experts`. Of equals, the first are chosen."""
    tokens, experts = logits_TE.shape
    ids_TA = torch.empty((tokens, num_active), dtype=torch.int64, device=logits_TE.device)
    weights_TA = torch.empty((tokens, num_active), dtype=torch.float32, device=logits_TE.device)
    if tokens:
        padded = triton.next_power_of_2(experts)
        rows = max(1, ELEMENTS // padded) if tokens > MANY else 1
        _choose_kernel[(triton.cdiv(tokens, rows),)](
            logits_TE,
            ids_TA,
            weights_TA,
            tokens,
            experts,
            *logits_TE.stride(),
            ACTIVE=num_active,
            CHOICES=triton.next_power_of_2(num_active),
            NORMALIZE=normalize,
            ROWS=rows,
            EXPERTS=padded,
            num_warps=1 if rows * padded <= 256 else 4,
            **overlapped(logits_TE.device),
        )
    return ids_TA, weights_TA


@triton.jit(do_not_specialize=["tokens"])
def _choose_kernel(
    logits_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    tokens: tl.tensor,
    experts: tl.tensor,
    stride_t: tl.tensor,
    stride_e: tl.tensor,
    ACTIVE: tl.constexpr,
    CHOICES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    release(OVERLAP)
    wait(OVERLAP)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, EXPERTS)
    choices = tl.arange(0, CHOICES)
    exists = (rows < tokens)[:, None] & (columns < experts)[None, :]
    places = logits_ptr + rows[:, None] * stride_t + columns[None, :] * stride_e
    left = tl.load(places, mask=exists, other=-float("inf")).to(tl.float32)
    powers = tl.exp(left - tl.max(left, axis=1)[:, None])
    probs = powers / tl.sum(powers, axis=1)[:, None]
    left = tl.where(exists, left, -float("inf"))
    ids = tl.zeros([ROWS, CHOICES], dtype=tl.int32)
    weights = tl.zeros([ROWS, CHOICES], dtype=tl.float32)
    for choice in tl.static_range(ACTIVE):
        best = tl.max(left, axis=1)
        first = tl.min(tl.where(left == best[:, None], columns[None, :], EXPERTS), axis=1)
        chosen = columns[None, :] == first[:, None]
        ids = tl.where(choices[None, :] == choice, first[:, None], ids)
        weight = tl.sum(tl.where(chosen, probs, 0.0), axis=1)
        weights = tl.where(choices[None, :] == choice, weight[:, None], weights)
        left = tl.where(chosen, -float("inf"), left)
    if NORMALIZE:
        weights = weights / tl.sum(weights, axis=1)[:, None]
    out = rows[:, None] * ACTIVE + choices[None, :]
    mask = (rows < tokens)[:, None] & (choices < ACTIVE)[None, :]
    tl.store(ids_ptr + out, ids.to(tl.int64), mask=mask)
    tl.store(weights_ptr + out, weights, mask=mask)
