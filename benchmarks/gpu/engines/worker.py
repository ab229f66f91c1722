"""What an engine's process does: load, answer once, then run the jobs it was given.

In a folder of its own, because a script's folder is searched first: no module here has a name that an engine imports.

The job is the only argument, as JSON: ``{"model", "vocab", "begun", "deadline", "runs", "ceilings", "options"}``. Lines
of JSON go to standard output; whatever else the engine prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workloads import FIRST_ANSWER, WORKLOADS, Workload

Prompts = list[list[int]]


@dataclass(frozen=True)
class Engine:
    """One that is loaded.

    Attributes:
        generate: continue each prompt by that many greedy tokens, whatever they are; returns how many there are.
        reset: forget cached prefixes.
    """

    version: str
    generate: Callable[[Prompts, int], int]
    reset: Callable[[], object]


class Worker:
    """Runs a job's workloads on one engine."""

    def __init__(self, engine: Engine, vocab: int) -> None:
        self._engine = engine
        self._vocab = vocab

    def seconds(self, work: Workload, seed: str) -> float:
        """Of one run."""
        prompts = work.prompts(self._vocab, seed)
        begun = time.perf_counter()
        count = self._engine.generate(prompts, work.out)
        took = time.perf_counter() - begun
        assert count == work.requests * work.out, (count, work)
        self._engine.reset()
        return took

    def repetition(self, work: Workload, number: int) -> dict[str, Any]:
        """One run, and one for the first token where that says more."""
        line: dict[str, Any] = {"workload": work.name, "repetition": number}
        line["seconds"] = self.seconds(work, str(number))
        if work.latency:
            line["first_s"] = self.seconds(work.first(), f"{number}/first")
        return line


def main(load: Callable[[str, dict[str, Any]], Engine]) -> None:
    """Run this process's job on the engine that ``load`` makes of a model's folder and options."""
    job = json.loads(sys.argv[1])
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def emit(**line: Any) -> None:
        lines.write(json.dumps(line) + "\n")
        lines.flush()

    engine = load(job["model"], job["options"])
    loaded = time.time() - job["begun"]
    worker = Worker(engine, job["vocab"])
    worker.seconds(FIRST_ANSWER, "")
    emit(version=engine.version, loaded_s=loaded, ready_s=time.time() - job["begun"])
    if job["ceilings"]:
        from ceilings import ceilings

        read, flops = ceilings()
        emit(read=read, flops=flops)
    _run(worker, job["runs"], job["begun"] + job["deadline"], emit)


def _run(worker: Worker, runs: list[tuple[str, int]], deadline: float, emit: Callable[..., None]) -> None:
    """Each ``(workload, repetition)``, until a next one would probably end too late."""
    took: dict[str, float] = {}
    for name, number in runs:
        work, now = WORKLOADS[name], time.time()
        if now + took.get(name, 0.0) > deadline:
            continue
        if name not in took:
            worker.seconds(work.short(), "short")
        try:
            line = worker.repetition(work, number)
        except Exception as error:  # noqa: BLE001  (a peer that cannot run one may run another)
            emit(workload=name, error=f"{type(error).__name__}: {error}"[:400])
            continue
        took[name] = time.time() - now
        emit(**line)
