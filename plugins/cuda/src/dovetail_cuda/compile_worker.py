"""Processes that compile kernels into Triton's folder for another one, which then finds them there.

Compilers spend much of their time in Python, where threads of one process wait for each other. A worker needs no GPU.
All are forked from one that has imported what they need. Each says with a byte that it is ready, reads jobs from a pipe
until that ends, and answers each with a byte.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from select import POLLIN, poll
from typing import Any, BinaryIO, NamedTuple

from dovetail.platforms.cpu import machine

MOST = 12
"""Workers. There are three for four threads of the processor."""
PATIENCE = 180
"""Seconds until a worker that does not answer is given up; the slowest kernel takes a small part of that."""
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
    """A process, seen from the one that it works for. What goes wrong there leaves the kernel to be compiled here.

    Attributes:
        is_gone: it ended, or did not answer in time, and is asked for nothing any more: what it says now would be taken
            for an answer to something else.
    """

    def __init__(self, jobs: BinaryIO, answers: BinaryIO) -> None:
        self.is_gone = False
        self._jobs, self._answers = jobs, answers
        self._is_ready = False

    def is_ready(self, wait: bool = False) -> bool:
        """Whether it has all that it imports; ``wait`` until it has, or is gone."""
        if not (self._is_ready or self.is_gone):
            answer = self._answer(PATIENCE if wait else 0)
            self._is_ready = answer == DONE
            self.is_gone = answer == b"" or (wait and not self._is_ready)
        return self._is_ready

    def compile(self, job: Job) -> bool:
        """Whether it was compiled."""
        if self.is_gone:
            return False
        try:
            self._jobs.write(pickle.dumps(job))
        except OSError:
            self.is_gone = True
            return False
        except (pickle.PicklingError, TypeError, AttributeError):  # the job stays here
            return False
        answer = self._answer(PATIENCE)
        self.is_gone = not answer
        return answer == DONE

    def _answer(self, seconds: float) -> bytes | None:
        """A byte, none if the process has ended, or None if it says nothing for so long."""
        said = poll()
        said.register(self._answers, POLLIN)
        return self._answers.read(1) if said.poll(1000 * seconds) else None

    def close(self) -> None:
        """Let it end."""
        self._jobs.close()
        self._answers.close()


class Workers:
    """The processes, together.

    Attributes:
        each: one by one.
    """

    def __init__(self, folder: Path, count: int | None = None) -> None:
        """Start them; they begin with their imports.

        Args:
            folder: that Triton keeps kernels in.
            count: as many as this process may use the processor for, if not given.
        """
        if count is None:
            count = min(MOST, machine.usable_threads() * 3 // 4)
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
        """Let them end. None is at work but those that were given up."""
        if any(worker.is_gone for worker in self.each) or not any(worker.is_ready() for worker in self.each):
            self.kill()  # they would not end, or import to the end
        for worker in self.each:
            worker.close()
        self._process.wait()

    def kill(self) -> None:
        """End them, whatever they do. Those who wait for one see that it is gone."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # each is of one group, and no one else is
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
