"""Where :mod:`dovetail_cuda.kernels.prompts` can run. Not every release of Triton can import it."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
import triton
from torch import Tensor

from dovetail_cuda.kernels.prompt_tiles import KEYS

HOPPER = 9
FIRST_TRITON = (3, 6)
SIZES = (64, 128)
"""Head sizes that shared memory and registers have room for."""
MOST_GROUPED = 64
"""Query heads per key/value head."""
_ALIGNED = 8
"""Elements of 16 bits between rows that the copy engine can address, and rows of a pattern that it writes."""


def takes_prompts(
    q_THK: Tensor, keys_BNPK: Tensor, scale: float, window: int | None = None, soft_cap: float | None = None
) -> bool:
    """Whether the kernel computes this."""
    _, heads, size = q_THK.shape
    _, kv_heads, page, _ = keys_BNPK.shape
    return (
        has_engine(q_THK.device)
        and q_THK.dtype == keys_BNPK.dtype != torch.float32
        and size in SIZES
        and page % _ALIGNED == 0
        and KEYS % page == 0
        and MOST_GROUPED % (heads // kv_heads) == 0
        and window is None
        and soft_cap is None
        and scale > 0
        and keys_BNPK.is_contiguous()
        and q_THK.stride(2) == 1
        and all(number % _ALIGNED == 0 for number in (q_THK.storage_offset(), q_THK.stride(0), q_THK.stride(1)))
    )


@cache
def has_engine(device: torch.device) -> bool:
    """Whether kernels can be written for the copy engine and the groups of warps of Hopper."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != HOPPER:
        return False
    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return release >= FIRST_TRITON and find_spec("triton.experimental.gluon") is not None
