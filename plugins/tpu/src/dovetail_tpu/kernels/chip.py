"""Generations of the chip, as far as kernels and placement depend on them."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

LANES = 128
"""Elements in the last dimension of a vector register, in every generation."""

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Chip:
    """What one JAX device of a generation has.

    Attributes:
        name: as in names of slices.
        kind: JAX's ``device_kind``.
        hbm_bytes: memory of a device that the compiler lets a program use.
        hbm_bandwidth, bf16_rate: bytes and operations per second of a core.
        vmem_bytes, smem_bytes: vector and scalar memory of a core.
        cores: that a device may have, which share its memory. A kernel uses the second where its grid has a dimension
            that is declared parallel.
        int8_products, fp8_products: whether the matrix unit multiplies these. Where it does not, operands are to be
            widened to bfloat16 first.
    """

    name: str
    kind: str
    hbm_bytes: int
    hbm_bandwidth: float
    bf16_rate: float
    vmem_bytes: int
    smem_bytes: int = MIB
    cores: int = 1
    int8_products: bool
    fp8_products: bool

    @property
    def ridge(self) -> float:
        """Operations per byte of memory traffic at which arithmetic takes as long as the traffic."""
        return self.bf16_rate / self.hbm_bandwidth


V4 = Chip(
    name="v4",
    kind="TPU v4",
    hbm_bytes=int(15.25 * GIB),
    hbm_bandwidth=615e9,
    bf16_rate=137.5e12,
    vmem_bytes=16 * MIB,
    cores=2,
    int8_products=False,
    fp8_products=False,
)
V5E = Chip(
    name="v5e",
    kind="TPU v5 lite",
    hbm_bytes=int(15.75 * GIB),
    hbm_bandwidth=820e9,
    bf16_rate=197e12,
    vmem_bytes=128 * MIB,
    int8_products=True,
    fp8_products=False,
)
V5P = Chip(
    name="v5p",
    kind="TPU v5",
    hbm_bytes=int(95.74 * GIB),
    hbm_bandwidth=1230e9,
    bf16_rate=229.5e12,
    vmem_bytes=64 * MIB,
    cores=2,
    int8_products=True,
    fp8_products=False,
)
V6E = Chip(
    name="v6e",
    kind="TPU v6 lite",
    hbm_bytes=int(31.25 * GIB),
    hbm_bandwidth=1640e9,
    bf16_rate=920e12,
    vmem_bytes=128 * MIB,
    int8_products=True,
    fp8_products=True,
)
TPU7X = Chip(
    name="tpu7x",
    kind="TPU7x",
    hbm_bytes=int(94.75 * GIB),
    hbm_bandwidth=3700e9,
    bf16_rate=1155e12,
    vmem_bytes=64 * MIB,
    int8_products=False,
    fp8_products=True,
)

CHIPS = MappingProxyType({chip.name: chip for chip in (V4, V5E, V5P, V6E, TPU7X)})
"""By name. A tpu7x chip has two cores, each a device of its own; a v5p chip's two are one device. A v4 chip is driven
either way: memory is that of the former, and kernels divide their work as for the latter, which is right for both."""


def chip_of_kind(kind: str) -> Chip | None:
    """The generation of devices that JAX calls so; None for others, such as the host's."""
    return next((chip for chip in CHIPS.values() if chip.kind == kind), None)


def in_lanes(size: int) -> int:
    """``size``, rounded up to whole lanes."""
    return -(-size // LANES) * LANES
