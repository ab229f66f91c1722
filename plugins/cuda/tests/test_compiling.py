"""Kernels that are kept for the next start, and kernels that are compiled together, by a stand-in for the compiler."""

import inspect
import threading
import time
from pathlib import Path

import pytest
import torch
from triton.runtime import _async_compile, jit

from dovetail_cuda import compile_ahead, kernel_cache
from dovetail_cuda.compile_ahead import CompiledAhead
from dovetail_cuda.kernel_cache import KernelCache

HOPPER = (9, 0)


@pytest.fixture
def compiler_folder(monkeypatch):
    """Where Triton keeps kernels, left as it was."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.cache, "dir", "elsewhere")
    monkeypatch.setattr(triton.runtime.cache, "triton_key", lambda: "")
    return lambda: triton.knobs.cache.dir


def test_a_workload_is_complete_from_the_next_start_on(tmp_path, compiler_folder):
    first = KernelCache(tmp_path, HOPPER, "llama")
    folder = tmp_path / "cuda"
    assert compiler_folder().startswith(str(folder))
    assert compiler_folder().endswith("sm90")
    first.complete()
    assert not KernelCache(tmp_path, HOPPER, "llama").is_complete  # nothing was compiled, so nothing is kept
    Path(compiler_folder()).mkdir(parents=True)
    first.complete()
    assert not first.is_complete
    assert KernelCache(tmp_path, HOPPER, "llama").is_complete
    assert not KernelCache(tmp_path, HOPPER, "qwen").is_complete
    assert not KernelCache(tmp_path, (10, 0), "llama").is_complete


def test_other_sources_have_other_kernels(tmp_path, compiler_folder, monkeypatch):
    sources = tmp_path / "sources"
    sources.mkdir()
    monkeypatch.setattr(kernel_cache, "_SOURCES", sources)
    (sources / "norm.py").write_text("1")
    cache = KernelCache(tmp_path, HOPPER, "llama")
    cache._mark.parent.mkdir(parents=True)
    cache.complete()
    assert KernelCache(tmp_path, HOPPER, "llama").is_complete
    (sources / "norm.py").write_text("2")
    assert not KernelCache(tmp_path, HOPPER, "llama").is_complete


class Compiler:
    """Compiles by name, each for a while, and notes how many it compiles at a time."""

    def __init__(self):
        self.done, self.launched, self.at_once, self._running = {}, [], 0, 0
        self._lock = threading.Lock()

    def compile(self, name):
        with self._lock:
            self._running += 1
            self.at_once = max(self.at_once, self._running)
        time.sleep(0.05)
        with self._lock:
            self._running -= 1
        return Kernel()

    def run(self, kernel, *args, grid, warmup, **options):
        name = kernel.__name__
        if name not in self.done:
            mode = _async_compile.active_mode.get()
            keep = lambda compiled: self.done.update({name: compiled})  # noqa: E731
            if mode is not None:
                more = [print] * (len(inspect.signature(mode.submit).parameters) - 3)  # later releases also clean up
                return mode.submit(name, lambda: self.compile(name), keep, *more)
            keep(self.compile(name))
        if not warmup:
            self.launched.append(name)
            args[0].fill_(options["value"])
        return self.done[name]


class Kernel:
    def _init_handles(self):
        """Nothing to bring anywhere."""


@pytest.fixture
def compiler(monkeypatch):
    stand_in = Compiler()
    monkeypatch.setattr(jit.JITFunction, "run", lambda self, *args, **named: stand_in.run(self, *args, **named))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(compile_ahead, "THREADS", 4)
    return stand_in


def kernel(name):
    """Fills its first argument."""
    made = object.__new__(jit.JITFunction)
    made.__name__ = name
    return made


def test_a_step_runs_with_all_kernels_compiled_together(compiler):
    kernels = [kernel(f"k{i}") for i in range(4)]
    seen, finished = [], []

    def step(tensors, metadata):
        buffers = []
        for value, each in enumerate(kernels, start=1):
            buffers.append(torch.empty(3))
            seen.append(buffers[-1].tolist())
            jit.JITFunction.run(each, buffers[-1], grid=(1,), warmup=False, value=value)
        return torch.stack(buffers), tensors

    ahead = CompiledAhead(step, lambda: finished.append(1))
    out, passed = ahead("tensors", [])
    assert compiler.at_once > 1
    assert compiler.launched == ["k0", "k1", "k2", "k3"]
    assert seen[:4] == [[0, 0, 0]] * 4
    assert (out[:, 0].tolist(), passed) == ([1, 2, 3, 4], "tensors")
    ahead("tensors", [])
    assert len(compiler.launched) == 8
    assert finished == [1]


def test_a_step_whose_kernels_are_there_runs_once(compiler):
    compiler.done["k"] = Kernel()
    runs = []

    def step(tensors, metadata):
        runs.append(1)
        out = torch.empty(1)
        jit.JITFunction.run(kernel("k"), out, grid=(1,), warmup=False, value=7)
        return out, out

    out, _ = CompiledAhead(step, lambda: None)(None, [])
    assert (len(runs), out.tolist()) == (1, [7])
