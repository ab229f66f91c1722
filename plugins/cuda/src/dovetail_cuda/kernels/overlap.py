"""Kernels that start while the one before still ends (programmatic dependent launch, from Hopper on).

A kernel launched with :func:`overlapped` may begin as soon as every program of the kernel before has released it or has
ended. Before :func:`wait` nothing may be written, and nothing read but what no overlapped kernel writes, packed weights
and the tables that a step comes with, or what the kernel before had waited for when it released this one. (A kernel
that does not release others has ended before they begin.) Every program must come to it, so that no kernel ends before
all of its predecessors have.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

FIRST = (9, 0)
"""Compute capability from which kernels can overlap."""
_PREFETCH: tl.constexpr = tl.constexpr(
    """{
    .reg .pred is_first;
    .reg .pred is_asked;
    .reg .u32 thread;
    mov.u32 thread, %tid.x;
    setp.eq.u32 is_first, thread, 0;
    setp.gt.and.s32 is_asked, $2, 0, is_first;
    @is_asked cp.async.bulk.prefetch.L2.global [$1], $2;
    mov.u32 $0, 0;
    }"""
)


@cache
def overlapped(device: torch.device) -> dict[str, bool]:
    """Arguments of a launch on this device, for a kernel that has the parameter ``OVERLAP``."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= FIRST:
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


@triton.jit
def release(OVERLAP: tl.constexpr) -> None:
    """Let the next kernel begin, once every program has come here. Best called first: the next one waits by itself."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(OVERLAP: tl.constexpr) -> None:
    """Until the kernels before have ended, and what they wrote can be read."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(start: tl.tensor, size: tl.tensor, OVERLAP: tl.constexpr) -> None:
    """Bring memory near that is read after the wait. Cached lines are never stale, so this may come before it.

    Args:
        start: pointer to the first byte, at a multiple of 16.
        size: int32 bytes, a multiple of 16; nothing happens for none.
    """
    if OVERLAP:
        tl.inline_asm_elementwise(_PREFETCH, "=r,l,r", [start.to(tl.int64), size], tl.int32, is_pure=False, pack=1)
