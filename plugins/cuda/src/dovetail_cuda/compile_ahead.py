"""Compiling kernels in threads, all that are known, instead of one after the other as a step comes to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from inspect import getclosurevars
from queue import Empty, SimpleQueue
from threading import Lock, Semaphore
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from triton.runtime._async_compile import AsyncCompileMode, active_mode
from triton.runtime.jit import JITFunction

from dovetail.contracts.attention import StepTensors
from dovetail.contracts.platform import StepFunction
from dovetail.tensors import replaced
from dovetail_cuda.compile_worker import Job, Worker, Workers

THREADS = 12
"""Where no workers compile; else there is one for each."""
AHEAD = 3
"""Kernels that this process compiles at a time while workers still import."""
_LAUNCHING = Lock()
"""Held while Triton's way to launch is another one: of two threads that change it, each would restore what it found."""


class CompiledAhead:
    """A step that finds its kernels compiled when it runs.

    Met for the first time, it is gone through without kernels, while threads compile them. What a kernel would have
    written is zero meanwhile: an index into anything, and a number like any other.
    If it was a step of padding, whose results nobody reads, that is all for now, and the next size can be met while the
    threads work; but the last size runs. A kernel that is launched then is waited for, but no other.
    """

    def __init__(self, step: StepFunction, run: StepFunction, compilers: Compilers, is_last: bool = False) -> None:
        """Prepare one size.

        Args:
            step: what launches the kernels.
            run: the form in which it runs.
            is_last: of the sizes that warm-up meets.
        """
        self._step, self._run = step, run
        self._compilers = compilers
        self._is_last = is_last
        self._is_met = self._has_run = False

    def __call__(self, step: StepTensors, metadata: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Run the step."""
        if self._has_run:
            return self._run(step, metadata)
        if not self._is_met:
            self._is_met = True
            # Containers of its own: what layers derive and keep there is not sound.
            own_metadata = replaced(metadata, lambda tensor: tensor)
            with self._compilers.left_out():
                outputs = self._step(step, own_metadata)
                self._compilers.follow(outputs[1])
            if step.max_seq_len == 0 and (not self._is_last or self._compilers.is_leaving_out()):
                return outputs
        outputs = self._run(step, metadata)
        self._has_run = True
        return outputs


class Compilers:
    """Threads that compile what is left out."""

    def __init__(self, then: Callable[[Tensor], None], workers: Workers | None = None) -> None:
        """``then`` launches what is to be compiled as well, given the logits of the first step that is met. Processes
        compile for the threads, if there are any.
        """
        self._workers = workers
        self._pool = _Pool(() if workers is None else workers.each)
        self._mode = _Mode(self._pool)
        self._then: Callable[[Tensor], None] | None = then

    def follow(self, logits_SV: Tensor) -> None:
        """What comes after a step."""
        if self._then is not None:
            self._then(logits_SV)
            self._then = None

    def is_leaving_out(self) -> bool:
        """Whether this thread's kernels are left out now."""
        return active_mode.get() is self._mode

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Meanwhile this thread's kernels are not launched, but compiled."""
        if self.is_leaving_out():
            yield
            return

        def only_compile(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            return run(kernel, *args, grid=grid, warmup=warmup or self.is_leaving_out(), **options)

        with self._mode, _Zeroed(), _LAUNCHING:
            run = JITFunction.run
            JITFunction.run = only_compile
            try:
                yield
            finally:
                JITFunction.run = run

    def close(self) -> None:
        """Nothing else is to be compiled: wait for what is not done, and let the processes end."""
        self._mode.wait()
        self._pool.dismiss()
        if self._workers is not None:
            self._workers.close()

    def drop(self) -> None:
        """Nobody waits any more: compile nothing of what is queued, and end the processes. Idempotent."""
        self._pool.drop()
        if self._workers is not None:
            self._workers.kill()


class _Mode(AsyncCompileMode):  # type: ignore[misc]  # Triton has no types
    """Its base waits when it is left."""

    def submit(self, key: Any, compile_fn: Any, finalize_fn: Any, *more: Any) -> Any:
        """As its base. A launch finds what is under way, and waits for it: Triton 3.6 shows only what is done."""
        kernel = super().submit(key, compile_fn, finalize_fn, *more)
        finalize_fn(kernel if kernel.kernel is None else kernel.kernel)
        return kernel

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        active_mode.set(None)

    def wait(self) -> None:
        """Until everything is compiled."""
        for kernel in self.future_kernels.values():
            kernel.result()
        self.raw_futures.clear()
        self.future_kernels.clear()


class _Pool(ThreadPoolExecutor):
    """Has kernels compiled, and brings each to the device."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._idle: SimpleQueue[Worker] = SimpleQueue()
        self._ahead = Semaphore(AHEAD)
        self._is_dropped = False
        for worker in workers:
            self._idle.put(worker)
        device = torch.cuda.current_device()
        super().__init__(len(workers) or THREADS, "compiler", initializer=torch.cuda.set_device, initargs=(device,))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        """As its base."""

        def ready() -> Any:
            with self._helped(fn):
                if self._is_dropped:
                    raise CancelledError
                kernel = fn(*args, **named)  # finds what the worker left on disk
            kernel._init_handles()
            return kernel

        return super().submit(ready)

    def dismiss(self) -> None:
        """Ask no process any more."""
        with suppress(Empty):  # threads take them, too
            while True:
                self._idle.get_nowait()

    def drop(self) -> None:
        """Begin nothing any more. What a thread is at, it ends, and nobody waits for it."""
        self._is_dropped = True
        self.dismiss()
        self.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def _helped(self, compile_it: Callable[..., Any]) -> Iterator[None]:
        """Before it is compiled here, a worker does so. Until one is ready a few go ahead; more would get in each
        other's way.
        """
        about = getclosurevars(compile_it).nonlocals  # of the function in Triton that calls the compiler
        try:
            job = Job.of(about["src"], about["target"], about["options"])
            worker = self._idle.get_nowait()
        except (KeyError, Empty):  # another release of Triton, or nobody there
            yield
            return
        if not worker.is_ready() and self._ahead.acquire(blocking=False):
            self._idle.put(worker)
            try:
                yield
            finally:
                self._ahead.release()
            return
        worker.is_ready(wait=True)
        worker.compile(job)
        if not worker.is_gone:
            self._idle.put(worker)
        yield


class _Zeroed(TorchFunctionMode):
    """Memory that nobody has written to is zero, and so are products, which would take as long as those of a step."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear:
            x, weight_OI = args[:2]
            return x.new_zeros(*x.shape[:-1], len(weight_OI))
        result = func(*args, **(kwargs or {}))
        return result.zero_() if func in _UNWRITTEN else result


_UNWRITTEN = {torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty, Tensor.new_empty_strided}
