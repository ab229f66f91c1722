"""Sizes of memory, in words."""

from __future__ import annotations

import math

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def size(count: int) -> str:
    """Bytes in the largest unit that they fill once: ``"1.50 GiB"``, ``"256.0 MiB"``, ``"0.5 KiB"``."""
    if count >= GIB:
        return f"{count / GIB:.2f} GiB"
    if count >= MIB:
        return f"{count / MIB:.1f} MiB"
    return f"{count / KIB:.1f} KiB"


def gib_up(count: int) -> float:
    """Bytes as GiB with three decimals, rounded up: what an option that counts in GiB must be given to hold them."""
    return math.ceil(count * 1000 / GIB) / 1000
