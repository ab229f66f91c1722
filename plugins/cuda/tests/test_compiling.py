"""Kernels that are kept for the next start, and kernels that are compiled together, by a stand-in for the compiler."""

import fcntl
import inspect
import io
import os
import resource
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from torch.nn.functional import linear
from triton.backends.compiler import GPUTarget
from triton.runtime import _async_compile, jit

from dovetail.contracts.platform import Bucket
from dovetail.errors import ConfigError
from dovetail.platforms.cpu import machine
from dovetail_cuda import compile_ahead, compile_worker, kernel_cache, platform, sampling_ahead
from dovetail_cuda.compile_ahead import CompiledAhead, Compilers
from dovetail_cuda.compile_worker import DONE, Job, Worker, Workers
from dovetail_cuda.kernel_cache import KernelCache
from dovetail_cuda.kernels import names
from dovetail_cuda.kernels.norm import _rms_norm_kernel
from dovetail_cuda.platform import CudaPlatform

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
    assert not first.is_complete
    assert KernelCache(tmp_path, HOPPER, "llama").is_complete
    assert not KernelCache(tmp_path, HOPPER, "qwen").is_complete
    assert not KernelCache(tmp_path, (10, 0), "llama").is_complete


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, compiler_folder):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--compile-cache .*file cannot be used: .* Name a folder"):
        KernelCache(tmp_path / "file", HOPPER, "llama")


def test_other_sources_have_other_kernels(tmp_path, compiler_folder, monkeypatch):
    sources = tmp_path / "sources"
    sources.mkdir()
    monkeypatch.setattr(kernel_cache, "_SOURCES", sources)
    (sources / "norm.py").write_text("1")
    cache = KernelCache(tmp_path, HOPPER, "llama")
    cache.complete()
    assert KernelCache(tmp_path, HOPPER, "llama").is_complete
    (sources / "norm.py").write_text("2")
    assert not KernelCache(tmp_path, HOPPER, "llama").is_complete


class Compiler:
    """Compiles by name, each for a while, and notes how many it compiles at a time."""

    def __init__(self):
        self.done, self.compiled, self.launched, self.at_once, self._running = {}, [], [], 0, 0
        self._lock = threading.Lock()

    def compile(self, name):
        with self._lock:
            self._running += 1
            self.at_once = max(self.at_once, self._running)
        time.sleep(0.05)
        with self._lock:
            self._running -= 1
            self.compiled.append(name)
        return Kernel()

    def run(self, kernel, *args, grid, warmup, **options):
        name = kernel.__name__
        if name not in self.done:
            mode = _async_compile.active_mode.get()
            keep = lambda compiled: self.done.update({name: compiled})  # noqa: E731
            if mode is not None:
                base = inspect.signature(_async_compile.AsyncCompileMode.submit)
                more = [print] * (len(base.parameters) - 4)  # later releases also clean up
                return mode.submit(name, lambda: self.compile(name), keep, *more)
            keep(self.compile(name))
        if not warmup:
            if hasattr(self.done[name], "result"):
                self.done[name].result()
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


def step_of(names, seen):
    """A step that launches kernels of these names, and the tables of a step of so many tokens."""
    kernels = [kernel(name) for name in names]

    def step(tensors, metadata):
        buffers = []
        for value, each in enumerate(kernels, start=1):
            buffers.append(torch.empty(3))
            seen.append(buffers[-1].tolist())
            jit.JITFunction.run(each, buffers[-1], grid=(1,), warmup=False, value=value)
        return torch.stack(buffers), torch.zeros(1)

    return step


PADDING, REAL = SimpleNamespace(max_seq_len=0), SimpleNamespace(max_seq_len=7)


def test_kernels_of_all_sizes_are_compiled_together(compiler):
    followed, seen = [], []
    compilers = Compilers(followed.append)
    first, second = step_of(["a", "b", "c"], seen), step_of(["c", "d"], seen)
    larger = CompiledAhead(first, first, compilers)
    smallest = CompiledAhead(second, second, compilers, is_last=True)
    assert larger(PADDING, [])[0].tolist() == [[0, 0, 0]] * 3
    assert compiler.launched == []
    out, _ = smallest(PADDING, [])
    assert compiler.launched == ["c", "d"]
    compilers.close()
    assert compiler.at_once > 1
    assert sorted(compiler.compiled) == ["a", "b", "c", "d"]
    assert seen[:5] == [[0, 0, 0]] * 5
    assert out[:, 0].tolist() == [1, 2]
    assert larger(REAL, [])[0][:, 0].tolist() == [1, 2, 3]
    assert sorted(compiler.compiled) == ["a", "b", "c", "d"]
    assert [logits.tolist() for logits in followed] == [[0]]


def test_a_real_step_is_complete_when_first_met(compiler):
    ran = []
    step = step_of(["a", "b"], [])
    ahead = CompiledAhead(
        step, lambda *args: (ran.append(1), step(*args))[1], Compilers(lambda logits: None), is_last=True
    )
    out, _ = ahead(REAL, [])
    assert out[:, 0].tolist() == [1, 2]
    assert compiler.launched == ["a", "b"]
    ahead(REAL, [])
    assert len(ran) == 2


def test_a_cache_is_complete_when_warm_up_is_over(tmp_path, compiler, compiler_folder, monkeypatch):
    """Not with the smallest size of a model: its draft model's sizes follow."""
    monkeypatch.setattr(platform, "GraphStep", lambda step, pool: step)
    monkeypatch.setattr(sampling_ahead, "sample_every_way", lambda logits: None)
    tested = object.__new__(CudaPlatform)
    tested._pool, tested._compilers, tested._workers = object(), None, None
    tested._kernels = KernelCache(tmp_path, HOPPER, "llama")
    for name in ("a model's", "its draft's"):
        tested.compile(step_of([name], []), Bucket(1, 1))(PADDING, [])
        assert not KernelCache(tmp_path, HOPPER, "llama").is_complete
    tested.warmed_up()
    assert compiler.compiled == ["a model's", "its draft's"]
    assert KernelCache(tmp_path, HOPPER, "llama").is_complete


@pytest.mark.parametrize("eager", [False, True])
def test_what_a_check_will_launch_is_compiled_together(eager, compiler):
    tested = object.__new__(CudaPlatform)
    tested._pool = None if eager else object()
    tested._kernels, tested._compilers, tested._workers = None, None, None
    step = step_of(["a", "b", "c"], [])
    tested.prepare(lambda: step(PADDING, []))
    assert compiler.launched == []
    step(PADDING, [])
    assert sorted(compiler.compiled) == compiler.launched == ["a", "b", "c"]
    assert (compiler.at_once > 1) != eager


def test_what_a_step_derives_while_kernels_are_left_out_is_derived_again(compiler):
    """As an attention backend does, whose first layer computes what the others share."""
    fill = kernel("a")

    def step(tensors, metadata):
        derived = metadata[0]
        if "tiles" not in derived:
            derived["tiles"] = torch.empty(3)
            jit.JITFunction.run(fill, derived["tiles"], grid=(1,), warmup=False, value=1)
        return derived["tiles"].clone(), torch.zeros(1)

    out, _ = CompiledAhead(step, step, Compilers(lambda logits: None))(REAL, [{}])
    assert out.tolist() == [1, 1, 1]


def test_products_are_not_computed_while_kernels_are_left_out(compiler):
    x, weight = torch.ones(2, 3, 4), torch.ones(5, 4)
    with Compilers(lambda logits: None).left_out():
        out = linear(x, weight, torch.ones(5))
    assert torch.equal(out, torch.zeros(2, 3, 5))
    assert linear(x, weight).sum() == 2 * 3 * 5 * 4


def test_what_is_compiled_already_is_left_out_too(compiler):
    compiler.done["a"] = Kernel()
    step = step_of(["a", "b"], [])
    out, _ = CompiledAhead(step, step, Compilers(lambda logits: None))(PADDING, [])
    assert compiler.launched == []
    assert out[:, 0].tolist() == [0, 0]


def test_kernels_of_other_threads_are_launched_meanwhile(compiler):
    """Those of an engine beside this one, which may come to new kernels at the same time."""
    step = step_of(["a"], [])
    mine, others = Compilers(lambda logits: None), Compilers(lambda logits: None)
    begun, ended = threading.Event(), threading.Event()
    before, beside = jit.JITFunction.run, []

    def engine():
        beside.append(step(REAL, [])[0].tolist())
        begun.set()
        with others.left_out():
            beside.append(step(REAL, [])[0].tolist())
            ended.wait(10)

    thread = threading.Thread(target=engine)
    with mine.left_out():
        thread.start()
        assert begun.wait(10)
        assert step(REAL, [])[0].tolist() == [[0, 0, 0]]
    ended.set()
    thread.join()
    assert beside == [[[1, 1, 1]], [[0, 0, 0]]]
    assert jit.JITFunction.run is before


def test_a_step_of_one_token_does_not_run_while_kernels_are_left_out(compiler):
    """It would be captured as a graph before it has ever run."""
    step, ran, compilers = step_of(["a"], []), [], Compilers(lambda logits: None)
    smallest = CompiledAhead(step, lambda *args: (ran.append(1), step(*args))[1], compilers, is_last=True)
    with compilers.left_out():
        assert smallest(PADDING, [])[0].tolist() == [[0, 0, 0]]
    assert not ran
    assert smallest(PADDING, [])[0].tolist() == [[1, 1, 1]]


def test_the_compiler_is_known_by_its_files(tmp_path):
    (tmp_path / "_C").mkdir()
    files = [tmp_path / "__init__.py", tmp_path / "_C" / "lib.so"]
    keys = set()
    for content in ("1", "2", "33"):
        for file in files:
            file.write_text(content)
            os.utime(file, ns=(0, len(keys)))
            names.files_key.cache_clear()
            keys.add(names.files_key(tmp_path))
    assert len(keys) == 6
    names.files_key.cache_clear()
    assert names.files_key(tmp_path) in keys
    assert triton.runtime.cache.triton_key() == names.files_key(Path(triton.__file__).parent)


def test_a_worker_leaves_kernels_where_they_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # a release of Triton warns where nobody says
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    hits = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda *, cache_hit, **_: hits.append(cache_hit))
    target = GPUTarget("cuda", 90, 32)
    options = triton.compiler.compiler.make_backend(target).parse_options({"num_warps": 2})
    quantization = {"GROUP": 0, "LARGEST": 127.0, "INTEGER": False}
    constants = {"inner": 1, "ADD": False, **quantization, "ROWS": 1, "BLOCK": 64, "OVERLAP": False}
    kinds = {name: "*bf16" if name.endswith("_ptr") else "i32" for name in _rms_norm_kernel.arg_names}
    signature = {**kinds, "eps": "fp32", **dict.fromkeys(constants, "constexpr")}
    places = {(_rms_norm_kernel.arg_names.index(name),): value for name, value in constants.items()}

    def source():
        return triton.compiler.ASTSource(_rms_norm_kernel, signature, places, {})

    src = source()
    (tmp_path / "triton.py").write_text("raise ImportError")  # workers import none of what lies where the engine starts
    monkeypatch.chdir(tmp_path)
    workers = Workers(tmp_path, 2)
    worker = workers.each[1]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(triton.compiler.CompiledKernel, "_init_handles", lambda self: None)
    assert all(each.is_ready(wait=True) for each in workers.each)
    with compile_ahead._Pool([worker]) as pool:
        pool.submit(lambda: triton.compile(src, target=target, options=vars(options))).result()
    assert hits == [True]
    assert not worker.compile(Job.of(source(), target, options)._replace(name="nothing"))
    assert not worker.compile(Job.of(source(), target, options)._replace(options={"num_warps": lambda: 1}))
    workers.close()
    assert workers._process.poll() == 0


def test_few_are_compiled_here_until_workers_are_ready(monkeypatch):
    """The others wait for them."""
    ready, at_once, most = threading.Event(), [], []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(Job, "of", lambda *about: about)
    asked = []
    worker = SimpleNamespace(
        is_ready=lambda wait=False: ready.wait(10 if wait else 0),
        compile=lambda job: asked.append(job),
        is_gone=False,
    )
    src, target, options = "source", "target", "options"

    def compile_it():
        at_once.append((src, target, options))
        most.append(len(at_once))
        if not asked:
            time.sleep(0.05)
        at_once.pop()
        return Kernel()

    with compile_ahead._Pool([worker] * compile_ahead.THREADS) as pool:
        kernels = [pool.submit(compile_it) for _ in range(20)]
        time.sleep(0.02)
        assert len(at_once) == compile_ahead.AHEAD
        ready.set()
        for compiled in kernels:
            compiled.result()
    assert len(asked) >= 20 - 2 * compile_ahead.AHEAD


def test_no_more_are_compiled_together_than_there_are_workers(monkeypatch):
    """The others would be compiled here, in each other's way."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(Job, "of", lambda *about: about)
    src, target, options = "source", "target", "options"
    asked = []

    def compile_there(job):
        time.sleep(0.01)
        asked.append(job)

    ready = {"is_ready": lambda wait=False: True, "is_gone": False}
    workers = [SimpleNamespace(compile=compile_there, **ready) for _ in range(2)]
    with compile_ahead._Pool(workers) as pool:
        for compiled in [pool.submit(lambda: (src, target, options, Kernel())[-1]) for _ in range(20)]:
            compiled.result()
    assert len(asked) == 20


@pytest.fixture
def many_files():
    """As many as may be open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("many_files")
def test_workers_are_asked_however_many_files_are_open():
    """More than ``select`` can name."""
    low, answer = os.pipe()
    answers = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 1024)
    os.close(low)
    worker = Worker(io.BytesIO(), os.fdopen(answers, "rb", buffering=0))
    assert not worker.is_ready()
    os.write(answer, DONE)
    os.close(answer)
    assert worker.is_ready(wait=True)
    worker.close()


def test_a_worker_that_died_is_no_loss(tmp_path):
    workers = Workers(tmp_path, 1)
    workers._process.kill()
    workers._process.wait()
    (worker,) = workers.each
    job = Job(type(None), "module", "name", {}, {}, {}, None, {})
    assert not worker.is_ready(wait=True)
    assert not worker.compile(job)
    workers.close()


NO_JOB = Job(type(None), "module", "name", {}, {}, {}, None, {})


@pytest.fixture
def silent():
    """A worker, and what is written to it, and the end at which it would answer."""
    answers, answer = os.pipe()
    jobs = io.BytesIO()
    worker = Worker(jobs, os.fdopen(answers, "rb", buffering=0))
    yield worker, jobs, answer
    worker.close()
    os.close(answer)


def test_a_worker_that_hangs_is_given_up(silent, monkeypatch):
    """What it says later is no answer to anything."""
    worker, jobs, answer = silent
    os.write(answer, DONE)
    assert worker.is_ready()
    monkeypatch.setattr(compile_worker, "PATIENCE", 0.05)
    assert not worker.compile(NO_JOB)
    assert worker.is_gone
    asked = len(jobs.getvalue())
    os.write(answer, DONE)
    assert not worker.compile(NO_JOB)
    assert len(jobs.getvalue()) == asked


def test_a_worker_that_imports_for_ever_is_given_up(silent, monkeypatch):
    worker, jobs, _ = silent
    monkeypatch.setattr(compile_worker, "PATIENCE", 0.05)
    assert not worker.is_ready()
    assert not worker.is_gone
    assert not worker.is_ready(wait=True)
    assert not worker.compile(NO_JOB)
    assert jobs.getvalue() == b""


def test_kernels_of_workers_that_were_given_up_are_compiled_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(Job, "of", lambda *about: about)
    src, target, options = "source", "target", "options"
    asked = []
    worker = SimpleNamespace(is_ready=lambda wait=False: True, is_gone=False)
    worker.compile = lambda job: (asked.append(job), setattr(worker, "is_gone", True))
    with compile_ahead._Pool([worker]) as pool:
        compiled = [pool.submit(lambda: (src, target, options, Kernel())[-1]) for _ in range(5)]
        assert all(isinstance(each.result(), Kernel) for each in compiled)
    assert len(asked) == 1


HANGS = """
import os, sys, time
for pair in sys.argv[1:]:
    if os.fork() == 0:
        os.write(int(pair.split(":")[1]), b"\\1")
        time.sleep(600)
time.sleep(600)
"""


@pytest.fixture
def hanging(tmp_path, monkeypatch):
    """Processes that say that they are ready, and nothing else ever."""
    popen = compile_worker.subprocess.Popen

    def instead(command, **choices):
        return popen([command[0], "-c", HANGS, *command[4:]], **choices)

    monkeypatch.setattr(compile_worker.subprocess, "Popen", instead)
    workers = Workers(tmp_path, 2)
    assert all(worker.is_ready(wait=True) for worker in workers.each)
    return workers


def are_gone(workers):
    """Whether no process of its group is left, a moment after they were killed."""
    for _ in range(500):
        if not group_of(workers):
            return True
        time.sleep(0.01)
    return False


def group_of(workers):
    """The processes of its group that run."""
    stats = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # others come and go
            stats.append(path.read_text().rpartition(")")[2].split())
    return [stat for stat in stats if int(stat[2]) == workers._process.pid and stat[0] != "Z"]


def test_a_worker_that_hangs_does_not_keep_the_others_from_ending(hanging, monkeypatch):
    monkeypatch.setattr(compile_worker, "PATIENCE", 0.05)
    assert len(group_of(hanging)) == 3
    assert not hanging.each[0].compile(NO_JOB)
    hanging.close()
    assert are_gone(hanging)


def test_what_is_queued_is_dropped_where_loading_fails(hanging, monkeypatch):
    """And those who wait for a process compile nothing instead."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(Job, "of", lambda *about: NO_JOB)
    here = []
    tested = object.__new__(CudaPlatform)
    tested._workers, tested._compilers = hanging, Compilers(lambda logits: None, hanging)
    src, target, options = "source", "target", "options"
    queued = [tested._compilers._pool.submit(lambda: here.append((src, target, options)) or Kernel()) for _ in range(8)]
    while not all(each.running() for each in queued[:2]):
        time.sleep(0.001)
    started = time.monotonic()
    tested.close()
    for each in queued:
        assert each.cancelled() or isinstance(each.exception(10), compile_ahead.CancelledError)
    assert time.monotonic() - started < 5
    assert here == []
    assert are_gone(hanging)
    tested.close()
    hanging.close()


def test_workers_end_where_nothing_was_compiled_yet(hanging):
    tested = object.__new__(CudaPlatform)
    tested._workers, tested._compilers = hanging, None
    tested.close()
    assert are_gone(hanging)
    hanging.close()


@pytest.mark.parametrize(("threads", "count"), [(4, 3), (64, 12), (1, 0)])
def test_there_are_as_many_workers_as_the_container_has_processors_for(tmp_path, monkeypatch, threads, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(96)))
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    (tmp_path / "cpu.max").write_text(f"{threads * 100_000} 100000")
    workers = Workers(tmp_path)
    workers.kill()
    workers.close()
    assert len(workers.each) == count
