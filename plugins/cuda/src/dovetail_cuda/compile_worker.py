"""Processes that compile kernels into Triton's folder for another one, which then finds them there.

Compilers spend much of their time in Python, where threads of one process wait for each other. A worker needs no GPU.
All are forked from one that has imported what they need. Each says with a byte that it is ready, reads jobs from a pipe
until that ends, and answers each with a byte.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from select import POLLIN, poll
from typing import Any, BinaryIO, NamedTuple

WORKERS = min(12, (os.cpu_count() or 1) * 3 // 4)
DONE, FAILED = b"\1", b"\0"


class Job(NamedTuple):
    """One kernel and everything that decides how it is compiled.

    Attributes:
        source: Triton's class for the kernel's language.
    """

    source: type
    module: str
    name: str
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    target: Any
    options: dict[str, Any]

    @classmethod
    def of(cls, source: Any, target: Any, options: Any) -> Job:
        """Of what Triton is about to compile."""
        fn = source.fn
        where = fn.__module__, fn.__name__
        return cls(type(source), *where, source.signature, source.constants, source.attrs, target, dict(vars(options)))

    def run(self) -> None:
        """Compile it."""
        import triton

        fn = getattr(import_module(self.module), self.name)
        source = self.source(fn, self.signature, self.constants, self.attributes)
        triton.compile(source, target=self.target, options=self.options)


class Worker:
    """A process, seen from the one that it works for. What goes wrong there leaves the kernel to be compiled here."""

    def __init__(self, jobs: BinaryIO, answers: BinaryIO) -> None:
        self._jobs, self._answers = jobs, answers
        self._is_ready = False

    def is_ready(self, wait: bool = False) -> bool:
        """Whether it has all that it imports; ``wait`` until it has, or is gone."""
        if not self._is_ready:
            said = poll()
            said.register(self._answers, POLLIN)
            self._is_ready = bool(said.poll(None if wait else 0)) and self._answers.read(1) == DONE
        return self._is_ready

    def compile(self, job: Job) -> bool:
        """Whether it was compiled."""
        try:
            self._jobs.write(pickle.dumps(job))
        except (OSError, pickle.PicklingError, TypeError, AttributeError):  # it is gone, or the job stays here
            return False
        return self._answers.read(1) == DONE

    def close(self) -> None:
        """Let it end."""
        self._jobs.close()
        self._answers.close()


class Workers:
    """The processes, together.

    Attributes:
        each: one by one.
    """

    def __init__(self, folder: Path, count: int = WORKERS) -> None:
        """Start them; they begin with their imports.

        Args:
            folder: that Triton keeps kernels in.
        """
        environment = {**os.environ, "TRITON_CACHE_DIR": str(folder), "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        jobs, answers = [os.pipe() for _ in range(count)], [os.pipe() for _ in range(count)]
        theirs = [(job[0], answer[1]) for job, answer in zip(jobs, answers, strict=True)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, *(f"{job}:{answer}" for job, answer in theirs)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            pass_fds=[end for pair in theirs for end in pair],
            start_new_session=True,  # Ctrl-C is for the engine, which then closes the pipes
        )
        for pair in theirs:
            _close(pair)
        self.each = [
            Worker(os.fdopen(job[1], "wb", buffering=0), os.fdopen(answer[0], "rb", buffering=0))
            for job, answer in zip(jobs, answers, strict=True)
        ]

    def close(self) -> None:
        """Let them end. None is at work."""
        if not any(worker.is_ready() for worker in self.each):
            self._process.kill()  # it would import to the end
        for worker in self.each:
            worker.close()
        self._process.wait()


def _close(ends: Sequence[int]) -> None:
    for end in ends:
        os.close(end)


def main() -> None:
    """Become as many workers as there are pairs of pipes."""
    import_module("dovetail_cuda.ops")
    pairs = [tuple(map(int, pair.split(":"))) for pair in sys.argv[1:]]
    for pair in pairs:
        if os.fork() == 0:
            for other in pairs:
                if other != pair:
                    _close(other)
            _work(*pair)
    for pair in pairs:
        _close(pair)
    for _ in pairs:
        os.wait()
    os._exit(0)  # at once: the engine waits


def _work(job_end: int, answer_end: int) -> None:
    """Compile until nobody asks any more."""
    os.write(answer_end, DONE)
    with os.fdopen(job_end, "rb") as jobs:
        while True:
            try:
                job: Job = pickle.load(jobs)
            except EOFError:
                os._exit(0)
            try:
                job.run()
            except Exception:  # noqa: BLE001  the other process meets the same, and tells
                os.write(answer_end, FAILED)
            else:
                os.write(answer_end, DONE)


if __name__ == "__main__":
    main()
