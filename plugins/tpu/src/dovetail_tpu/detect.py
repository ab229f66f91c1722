"""Which chips this machine has, by the files of its PCI bus: a chip that is opened is taken from other processes."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from types import MappingProxyType

from dovetail_tpu.kernels.chip import TPU7X, V4, V5E, V5P, V6E

PCI = Path("/sys/bus/pci/devices")
GOOGLE = "0x1ae0"
CHIP_OF_DEVICE = MappingProxyType(
    {"0x005e": V4.name, "0x0063": V5E.name, "0x0062": V5P.name, "0x006f": V6E.name, "0x0076": TPU7X.name}
)
HOST = "cpu"
EXECUTES_ON_HOST = MappingProxyType({"jax": "JAX_PLATFORMS", "torch_xla": "PJRT_DEVICE"})
"""Variable by which each bridge's runtime is told what to execute on."""


def chips(pci: Path = PCI) -> Counter[str]:
    """Chips on the bus, by generation."""
    found: Counter[str] = Counter()
    for device in pci.glob("*"):
        if _read(device / "vendor") == GOOGLE:
            generation = CHIP_OF_DEVICE.get(_read(device / "device"))
            if generation is not None:
                found[generation] += 1
    return found


def executes_on_host(bridge: str) -> bool:
    """Whether somebody said that programs are to execute on the host, as tests do."""
    return os.environ.get(EXECUTES_ON_HOST[bridge], "").lower() == HOST


def _read(file: Path) -> str:
    return file.read_text().strip() if file.exists() else ""
