"""What this device can do, measured now."""

from __future__ import annotations

from collections.abc import Callable

import torch


def ceilings() -> tuple[float, float]:
    """Bytes per second that a sum reads, and operations per second of a large bf16 product."""
    values = torch.empty(1 << 27, dtype=torch.int64, device="cuda").random_()
    read = values.nbytes / seconds_of(values.sum)
    del values
    size = 8192
    x, y = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return read, 2 * size**3 / seconds_of(lambda: x @ y)


def seconds_of(run: Callable[[], object], times: int = 10) -> float:
    """Of one call on the device."""
    for _ in range(3):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / times
