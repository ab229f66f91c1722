"""What this machine has: instruction sets, cores that this process may use, memory. Torch-free."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
CGROUP = Path("/sys/fs/cgroup")
TOPOLOGY = Path("/sys/devices/system/cpu")

ISA_NEEDS = {
    "x86_64_v4_bf16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd", "avx512_bf16", "avx512_vnni"},
    "x86_64_v4": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"},
    "x86_64_v3": {"avx2", "fma", "bmi2", "f16c"},
}
"""CPU flags that each build of the kernels needs, best first."""

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Any of them: the CPU multiplies bf16 numbers itself."""


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """The CPU's feature flags; empty where the operating system does not tell."""
    return frozenset(_cpuinfo("flags").split()) or frozenset(_cpuinfo("Features").split())


def cpu_name() -> str:
    """The CPU's own name, or its architecture."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    if not CPUINFO.exists():
        return ""
    for line in CPUINFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def supported_isas() -> list[str]:
    """Names of the kernel builds that this CPU can run, best first."""
    machine = platform.machine().lower()
    if machine not in ("x86_64", "amd64"):
        return [machine]
    return [isa for isa, needs in ISA_NEEDS.items() if needs <= cpu_flags()]


def computes_bf16() -> bool:
    """Whether bf16 products run in hardware."""
    return not BF16_FLAGS.isdisjoint(cpu_flags())


def usable_cores() -> int:
    """Physical cores within this process's affinity mask and CPU quota; at least 1."""
    return _within_quota(len({_siblings(cpu) for cpu in _affinity()}))


def usable_threads() -> int:
    """The same with the hardware threads of each core counted."""
    return _within_quota(len(_affinity()))


def _affinity() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _within_quota(count: int) -> int:
    quota = _cpu_quota()
    return max(1, count if quota is None else min(count, int(quota)))


def _siblings(cpu: int) -> str:
    path = TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list"
    return path.read_text().strip() if path.exists() else str(cpu)


def _cpu_quota() -> float | None:
    """CPUs' worth of time per period that the control group grants, or None without a limit."""
    limit = _read(CGROUP / "cpu.max").split()
    if len(limit) == 2 and limit[0] != "max":
        return int(limit[0]) / int(limit[1])
    quota = _read(CGROUP / "cpu" / "cpu.cfs_quota_us")
    period = _read(CGROUP / "cpu" / "cpu.cfs_period_us")
    if quota and period and int(quota) > 0:
        return int(quota) / int(period)
    return None


def memory() -> tuple[int, int]:
    """Total and available bytes, within the control group's limit."""
    meminfo = _meminfo()
    total = meminfo.get("MemTotal", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    available = meminfo.get("MemAvailable", total // 2)
    limit, used = _read(CGROUP / "memory.max"), _read(CGROUP / "memory.current")
    if limit.isdigit() and used.isdigit() and int(limit) < total:
        total = int(limit)
        available = min(available, max(0, total - int(used)))
    return total, available


def _meminfo() -> dict[str, int]:
    rows = (line.split() for line in _read(Path("/proc/meminfo")).splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3}


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
