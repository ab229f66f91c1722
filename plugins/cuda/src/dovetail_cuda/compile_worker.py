"""A process that compiles kernels into Triton's folder for another one, which then finds them there.

Compilers spend much of their time in Python, where threads of one process wait for each other. A worker needs no GPU.
It reads jobs from standard input until that ends, and answers each with a byte.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

WORKERS = min(8, (os.cpu_count() or 1) // 2)
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
    """The process, seen from the one that it works for. What goes wrong there leaves the kernel to be compiled here."""

    def __init__(self, folder: Path) -> None:
        """Start it; it begins with its imports.

        Args:
            folder: that Triton keeps kernels in.
        """
        environment = {**os.environ, "TRITON_CACHE_DIR": str(folder), "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the engine, which then closes the pipe
        )

    def compile(self, job: Job) -> bool:
        """Whether it was compiled."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(pickle.dumps(job))
            self._process.stdin.flush()
        except (OSError, pickle.PicklingError, TypeError, AttributeError):  # it is gone, or the job stays here
            return False
        return self._process.stdout.read(1) == DONE

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
        except OSError:  # it is gone already
            self._process.kill()
        self._process.stdout.close()
        self._process.wait()


def main() -> None:
    """Compile until nobody asks any more."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what is printed is no answer
    import_module("dovetail_cuda.ops")
    while True:
        try:
            job: Job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            job.run()
        except Exception:  # noqa: BLE001  the other process meets the same, and tells
            answers.write(FAILED)
        else:
            answers.write(DONE)


if __name__ == "__main__":
    main()
