"""CompilePool: programs are compiled in threads, while the next one is traced."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

from dovetail.platforms.cpu import machine

MOST_THREADS = 16
"""Each compilation uses some threads of its own, and memory."""


class CompilePool:
    """Compilations under way."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(min(MOST_THREADS, machine.usable_threads()), "compile")
        self._under_way: list[Future[Any]] = []

    def submit(self, compile_it: Callable[[], Any]) -> Future[Any]:
        """Have it done."""
        future = self._threads.submit(compile_it)
        self._under_way.append(future)
        return future

    def wait(self, told: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Until all is compiled.

        Args:
            told: how many are, and of how many, each time that one is done.

        Raises:
            Exception: that of the first which failed.
        """
        total = len(self._under_way)
        for done, future in enumerate(as_completed(self._under_way), 1):
            future.result()
            told(done, total)
        self._under_way.clear()

    def close(self) -> None:
        """Begin nothing any more. What a thread compiles, it ends, and nobody waits for it. Idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)
