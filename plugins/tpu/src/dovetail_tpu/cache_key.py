"""Names of folders for compiled programs."""

from __future__ import annotations

import hashlib
import re

from dovetail_tpu.bridges.protocol import Bridge


def cache_key(bridge: Bridge, workload: str) -> str:
    """Equal for engines whose programs are: same chips, mesh, versions, model, number formats and limits, from which
    the buckets follow."""
    chip = re.sub(r"\W+", "-", bridge.device_kind.lower())
    parts = "\n".join((bridge.name, chip, str(bridge.num_devices), *bridge.versions, workload))
    return f"tpu-{bridge.name}-{chip}-x{bridge.num_devices}-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"
