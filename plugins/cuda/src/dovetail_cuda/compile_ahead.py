"""Compiling all kernels of a step at once, in threads, instead of one after the other as the step comes to them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.runtime._async_compile import AsyncCompileMode, FutureKernel
from triton.runtime.jit import JITFunction

from dovetail.contracts.attention import StepTensors
from dovetail.contracts.platform import StepFunction

THREADS = min(16, os.cpu_count() or 1)


class CompiledAhead:
    """A step whose first run finds its kernels compiled.

    It goes through the step once, leaving out the kernels that are not compiled yet, while threads compile them. If
    there were any, the step runs again. What such a kernel would have written is zero meanwhile: an index into
    anything, and a number like any other.
    """

    def __init__(self, step: StepFunction, then: Callable[[], None]) -> None:
        """``then`` is called after the first run."""
        self._step = step
        self._then: Callable[[], None] | None = then

    def __call__(self, step: StepTensors, metadata: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Run the step."""
        if self._then is None:
            return self._step(step, metadata)
        with _compiling() as left_out:
            outputs = self._step(step, metadata)
        if left_out:
            outputs = self._step(step, metadata)
        self._then()
        self._then = None
        return outputs


@contextmanager
def _compiling() -> Iterator[list[str]]:
    """Kernels that are not compiled are left out, and compiled when the context is left; gives their names."""
    left_out: list[str] = []
    run = JITFunction.run

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if isinstance(kernel, FutureKernel):
            left_out.append(self.__name__)
            return kernel
        return run(self, *args, grid=grid, warmup=warmup, **options)

    with _Compilers() as compilers, AsyncCompileMode(compilers), _Zeroed():
        JITFunction.run = launch
        try:
            yield left_out
        finally:
            JITFunction.run = run


class _Compilers(ThreadPoolExecutor):
    """Compiles kernels, and brings each to the device."""

    def __init__(self) -> None:
        device = torch.cuda.current_device()
        super().__init__(THREADS, "compiler", initializer=torch.cuda.set_device, initargs=(device,))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        """As its base."""

        def ready() -> Any:
            kernel = fn(*args, **named)
            kernel._init_handles()
            return kernel

        return super().submit(ready)


class _Zeroed(TorchFunctionMode):
    """Memory that nobody has written to is zero."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.zero_() if func in _UNWRITTEN else result


_UNWRITTEN = {torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty, Tensor.new_empty_strided}
