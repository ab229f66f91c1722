"""Where Triton keeps compiled kernels: a second start finds all of them there."""

from __future__ import annotations

from pathlib import Path

import torch


def keep_kernels(cache: Path, capability: tuple[int, int]) -> Path:
    """Make Triton use a folder of this chip and these versions; what a kernel is compiled from names its files there.

    Args:
        cache: shared with other platforms; a folder that cannot be written is Triton's to report.
        capability: of the device.
    """
    import triton  # not a dependency: torch brings it where there is CUDA

    chip = "".join(map(str, capability))
    folder = cache / "cuda" / f"torch-{torch.__version__}-triton-{triton.__version__}-sm{chip}"
    triton.knobs.cache.dir = str(folder)
    return folder
