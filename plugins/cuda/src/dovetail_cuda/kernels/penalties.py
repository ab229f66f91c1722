"""Repetition, frequency and presence penalties; logits of tokens that a request has not seen are not even read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def penalize(
    logits_SV: Tensor, rows_P: Tensor, slots_P: Tensor, factors_B3: Tensor, counts_BV: Tensor, in_prompt_BV: Tensor
) -> None:
    """See :func:`dovetail.ops.reference.penalize`."""
    width = logits_SV.shape[1]
    if len(rows_P):
        _penalize_kernel[(triton.cdiv(width, BLOCK), len(rows_P))](
            logits_SV,
            logits_SV.stride(0),
            rows_P.contiguous(),
            slots_P.contiguous(),
            factors_B3,
            counts_BV,
            in_prompt_BV.view(torch.uint8),
            width,
            BLOCK=BLOCK,
            num_warps=4,
        )


@triton.jit
def _penalize_kernel(
    logits_ptr: tl.tensor,
    stride: tl.tensor,
    rows_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    in_prompt_ptr: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row, slot = tl.load(rows_ptr + tl.program_id(1)), tl.load(slots_ptr + tl.program_id(1))
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    counts = tl.load(counts_ptr + slot * width + columns, mask=inside, other=0)
    in_prompt = tl.load(in_prompt_ptr + slot * width + columns, mask=inside, other=0)
    seen = (counts > 0) | (in_prompt > 0)
    logits_ptr += row * stride
    logits = tl.load(logits_ptr + columns, mask=seen)
    factors_ptr += slot * 3
    repetition, frequency = tl.load(factors_ptr), tl.load(factors_ptr + 1)
    presence = tl.where(counts > 0, tl.load(factors_ptr + 2), 0.0)
    logits = tl.where(logits > 0, tl.div_rn(logits, repetition), logits * repetition)
    tl.store(logits_ptr + columns, logits - frequency * counts.to(tl.float32) - presence, mask=seen)
