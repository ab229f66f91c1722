"""Kernels that start while the one before still ends (programmatic dependent launch, from Hopper on).

A kernel launched with :func:`overlapped` may begin as soon as every program of the kernel before has released it or has
ended. Nothing may be read or written before :func:`wait`, weights included: the kernel before may have made them. Every
program must come to it, so that no kernel ends before all of its predecessors have.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

FIRST = (9, 0)
"""Compute capability from which kernels can overlap."""


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
