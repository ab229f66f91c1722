"""The platform's facts and choices, on this machine and on described ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dovetail.contracts.platform import Bucket, PlatformConfig
from dovetail.errors import ConfigError
from dovetail.platforms.cpu import kernels, machine
from dovetail.platforms.cpu.pages import HUGE_PAGE, SMALL, Arena, Scratch, zeroed
from dovetail.platforms.cpu.platform import CpuPlatform


@pytest.fixture(autouse=True)
def keep_threads() -> None:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine described by files: write below the returned folder."""
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "TOPOLOGY", tmp_path / "topology")
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    machine.cpu_flags.cache_clear()
    yield tmp_path
    machine.cpu_flags.cache_clear()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_probe_says_what_an_operator_wants_to_know() -> None:
    probe = CpuPlatform.probe()
    assert probe.available
    assert set(probe.facts) == {"cpu", "cores", "bf16", "native kernels", "memory"}
    assert probe.facts["native kernels"] in kernels.built_isas()


def test_missing_kernels_are_reported_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FOLDER", tmp_path)
    kernels.load.cache_clear()
    assert CpuPlatform.probe().facts["native kernels"].startswith("absent: ")
    with pytest.raises(ConfigError, match="pip install --force-reinstall --no-deps dovetail-core"):
        kernels.load()
    platform = CpuPlatform(PlatformConfig(num_threads=2))
    assert platform.ops(torch.float32) == {}
    assert torch.get_num_threads() == 2
    kernels.load.cache_clear()


def test_a_cpu_without_the_needed_instructions_is_refused(described: Path) -> None:
    write(described / "cpuinfo", "model name : Old CPU\nflags : sse4_2 avx")
    assert kernels.built_isas() == []
    assert "Old CPU) lacks AVX2 and FMA" in kernels.missing_reason()


@pytest.mark.parametrize(
    ("flags", "isas", "bf16"),
    [
        ("avx2 fma bmi2 f16c", ["x86_64_v3"], False),
        ("avx2 fma bmi2 f16c avx512f avx512bw avx512vl avx512dq avx512cd", ["x86_64_v4", "x86_64_v3"], False),
        (
            "avx2 fma bmi2 f16c avx512f avx512bw avx512vl avx512dq avx512cd avx512_bf16 avx512_vnni",
            ["x86_64_v4_bf16", "x86_64_v4", "x86_64_v3"],
            True,
        ),
    ],
)
def test_instruction_sets_follow_the_cpus_flags(described: Path, flags: str, isas: list[str], bf16: bool) -> None:
    write(described / "cpuinfo", f"flags\t\t: {flags}")
    assert machine.supported_isas() == isas
    assert machine.computes_bf16() is bf16
    platform = CpuPlatform(PlatformConfig())
    assert platform.default_dtype(torch.bfloat16) is (torch.bfloat16 if bf16 else torch.float32)
    assert platform.default_dtype(torch.float32) is torch.float32
    assert platform.default_dtype(torch.float16) is torch.float32


def test_other_architectures_have_one_build(described: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    write(described / "cpuinfo", "Features : fp asimd bf16")
    assert machine.supported_isas() == ["aarch64"]
    assert machine.computes_bf16()


def test_cores_are_physical_and_within_affinity_and_quota(described: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu in range(8):
        write(described / "topology" / f"cpu{cpu}" / "topology" / "thread_siblings_list", f"{cpu % 4},{cpu % 4 + 4}")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)))
    assert machine.usable_cores() == 4
    assert machine.usable_threads() == 8
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1, 4})
    assert machine.usable_cores() == 2
    write(described / "cgroup" / "cpu.max", "max 100000")
    assert machine.usable_cores() == 2
    write(described / "cgroup" / "cpu.max", "150000 100000")
    assert machine.usable_cores() == 1
    write(described / "cgroup" / "cpu.max", "50000 100000")
    assert machine.usable_cores() == 1


def test_cores_within_the_older_quota(described: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)))
    write(described / "cgroup" / "cpu" / "cpu.cfs_quota_us", "300000")
    write(described / "cgroup" / "cpu" / "cpu.cfs_period_us", "100000")
    assert machine.usable_cores() == 3
    write(described / "cgroup" / "cpu" / "cpu.cfs_quota_us", "-1")
    assert machine.usable_cores() == 8


def test_memory_respects_the_containers_limit(described: Path) -> None:
    total, available = machine.memory()
    assert 0 < available <= total
    write(described / "cgroup" / "memory.max", str(1 << 20))
    write(described / "cgroup" / "memory.current", str(1 << 18))
    assert machine.memory() == (1 << 20, 3 << 18)
    write(described / "cgroup" / "memory.max", "max")
    assert machine.memory()[0] == total


def test_threads_follow_the_option() -> None:
    CpuPlatform(PlatformConfig(num_threads=2))
    assert torch.get_num_threads() == 1  # the kernels' pool computes
    with pytest.raises(ConfigError, match="--num-threads is 0"):
        CpuPlatform(PlatformConfig(num_threads=0))


def test_steps_run_at_their_own_size_and_uncompiled() -> None:
    platform = CpuPlatform(PlatformConfig(num_threads=1))
    assert platform.ops(torch.float64) == {}
    policy = platform.shape_policy(64, 8)
    assert policy.fit(13, 5) == Bucket(13, 5)
    assert policy.ladder() == (Bucket(1, 1),)

    def step() -> None: ...

    assert platform.compile(step, Bucket(1, 1)) is step


def test_pages_are_zero_aligned_and_writable() -> None:
    for size in (1, 5000, 3 << 20):
        pages = zeroed(size)
        assert pages.shape == (size,)
        assert pages.data_ptr() % HUGE_PAGE == 0
        assert not pages.any()
        pages.fill_(7)


def test_the_arena_keeps_its_tensors_apart() -> None:
    arena = Arena()
    taken = [arena.take(size) for size in (100, 64, 1, 40 << 20, 3)]
    for i, tensor in enumerate(taken):
        assert tensor.data_ptr() % 64 == 0
        tensor.fill_(i)
    assert all(bool((tensor == i).all()) for i, tensor in enumerate(taken))
    assert [len(tensor) for tensor in taken] == [100, 64, 1, 40 << 20, 3]


def test_scratch_memory_is_used_again_only_when_no_tensor_shows_it() -> None:
    scratch = Scratch()
    first = scratch.empty((SMALL, 3), torch.float32)
    address = first.data_ptr()
    view = first[5:9, 1]
    del first
    second = scratch.empty((SMALL, 3), torch.float32)
    assert second.data_ptr() != address
    view.fill_(7)
    second.fill_(1)
    assert view.tolist() == [7, 7, 7, 7]
    del view
    third = scratch.empty((SMALL - 5, 6), torch.bfloat16)  # about as many bytes
    assert third.data_ptr() == address
    assert third.shape == (SMALL - 5, 6)
    assert third.dtype == torch.bfloat16


def test_small_scratch_is_the_c_librarys() -> None:
    scratch = Scratch()
    assert scratch.empty((3, 5), torch.bfloat16).shape == (3, 5)
    assert not scratch._free


def test_scratch_may_outlive_its_owner() -> None:
    scratch = Scratch()
    tensor = scratch.empty((SMALL,), torch.float32)
    del scratch
    tensor.fill_(1)
    del tensor
