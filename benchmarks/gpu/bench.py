"""Dovetail and its peers on one GPU, one after another in processes of their own, beside what the device can do.

    python benchmarks/gpu/bench.py benchmarks/gpu/llama8b [--vllm PYTHON] [--transformers PYTHON] [--results FILE]

A peer is measured when the Python of its own environment is given. With ``--results``, what is measured stays in a file
as it comes, a later call only runs what is missing on this device, and the table shows both.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from engines.workloads import WORKLOADS, Workload
from floor import Rates, Shape

ENGINES_FOLDER = Path(__file__).parent / "engines"
ENGINES = {"dovetail": "engine_dovetail.py", "vllm": "engine_vllm.py", "transformers": "engine_transformers.py"}
CACHES = {
    "XDG_CACHE_HOME": "xdg",
    "DOVETAIL_CACHE": "dovetail",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "VLLM_CACHE_ROOT": "vllm",
    "CUDA_CACHE_PATH": "driver",
}
"""What tells engines and the driver where to keep compiled kernels."""
LATE_S = 20.0
"""How long past its deadline an engine's process may take to end by itself."""

Line = dict[str, Any]


class Results:
    """Lines of one model on one device, kept in a file if there is one."""

    def __init__(self, path: Path | None, model: str, device: str) -> None:
        self._path = path
        self._where = {"model": model, "device": device}
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self._lines: list[Line] = [line for line in map(json.loads, lines) if self._where.items() <= line.items()]

    def add(self, engine: str, line: Line) -> None:
        """One more."""
        line = {**self._where, "engine": engine, **line}
        self._lines.append(line)
        print(json.dumps(line), flush=True)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def of(self, engine: str, key: str, workload: str | None = None) -> list[Any]:
        """Every value of a key."""
        mine = (line for line in self._lines if line["engine"] == engine and line.get("workload") == workload)
        return [line[key] for line in mine if key in line]

    def missing(self, engine: str, names: Iterable[str], repetitions: int) -> list[tuple[str, int]]:
        """Runs still to make: each workload once, then each twice …"""
        have = {name: len(self.of(engine, "seconds", name)) for name in names}
        return [(name, number) for number in range(repetitions) for name in have if number >= have[name]]


def measure(engine: str, python: str, job: Line, cache: Path | None = None) -> Iterator[Line]:
    """Run an engine's process and yield what it says; with ``cache``, its compiled kernels are in a folder of it."""
    begun = time.time()
    process = subprocess.Popen(
        [python, str(ENGINES_FOLDER / ENGINES[engine]), json.dumps({**job, "begun": begun})],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **({} if cache is None else {key: str(cache / engine / at) for key, at in CACHES.items()})},
        start_new_session=True,  # with its own children, it can be ended as a group
    )
    assert process.stdout is not None
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(process.pid, signal.SIGKILL))
    signal.alarm(int(job["deadline"] + LATE_S))
    try:
        yield from map(json.loads, process.stdout)
        code = process.wait()
        if code:
            yield {"error": f"ended with status {code}"}
    finally:
        signal.alarm(0)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a child that lingers would keep the device's memory
        process.wait()


def device_name() -> str:
    """What the driver calls the first GPU."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()


class Report:
    """The table of one model.

    Args:
        engines: in the order of its columns; Dovetail first.
    """

    def __init__(self, results: Results, engines: list[str], shape: Shape, device: str) -> None:
        self._results = results
        self._engines = engines
        self._shape = shape
        self._device = device

    def lines(self, names: list[str], model: str) -> Iterator[str]:
        """Markdown; after a peer's figure, how many times as fast Dovetail is."""
        reads, flops = (self._results.of("dovetail", key) for key in ("read", "flops"))
        if not reads:
            yield "No ceilings: Dovetail's process did not get that far."
            return
        rates = Rates(statistics.median(reads), statistics.median(flops))
        yield f"{model} on {self._device}: {rates.read / 1e12:.2f} TB/s read, {rates.flops / 1e12:.0f} TFLOP/s in bf16"
        versions = [
            f"{engine} {v[-1]}" if (v := self._results.of(engine, "version")) else "" for engine in self._engines
        ]
        yield "| workload | floor | of it | " + " | ".join(filter(None, versions)) + " |"
        yield "|---" * (3 + len(list(filter(None, versions)))) + "|"
        for name in names:
            work = WORKLOADS[name]
            floor = self._shape.floor(work, rates)
            yield self._row(f"{name} total, s", {e: self._results.of(e, "seconds", name) for e in self._engines}, floor)
            if work.latency:
                yield self._row(f"{name} first token, ms", {e: self._first(e, work) for e in self._engines})
                step = (floor - self._shape.floor(work.first(), rates)) / (work.out - 1)
                yield self._row(f"{name} per token, ms", {e: self._steps(e, work) for e in self._engines}, 1e3 * step)
        yield self._row("process start → first answer, s", {e: self._results.of(e, "ready_s") for e in self._engines})

    def _first(self, engine: str, work: Workload) -> list[float]:
        return [1e3 * seconds for seconds in self._results.of(engine, "first_s", work.name)]

    def _steps(self, engine: str, work: Workload) -> list[float]:
        pairs = zip(
            self._results.of(engine, "seconds", work.name), self._results.of(engine, "first_s", work.name), strict=True
        )
        return [1e3 * (total - first) / (work.out - 1) for total, first in pairs]

    def _row(self, title: str, values: dict[str, list[float]], floor: float | None = None) -> str:
        ours = statistics.median(values["dovetail"]) if values["dovetail"] else None
        cells = [f"{floor:.4g}" if floor else "", f"{floor / ours:.2f}" if floor and ours else ""]
        for engine, own in values.items():
            if not self._results.of(engine, "version"):
                continue
            median = statistics.median(own) if own else None
            cell = f"{median:.4g} ({len(own)})" if median is not None else "–"
            cells.append(cell + (f" × {median / ours:.2f}" if median and ours and engine != "dovetail" else ""))
        return f"| {title} | " + " | ".join(cells) + " |"


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", default=",".join(WORKLOADS))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--results", type=Path, help="file of lines to add to, and to read what is measured from")
    parser.add_argument(
        "--cache", type=Path, help="folder for compiled kernels, by engine; default: where each has them"
    )
    parser.add_argument("--deadline", type=float, default=600.0, help="seconds for each engine's process")
    parser.add_argument("--options", type=json.loads, default={}, help="of Dovetail's engine, as JSON")
    parser.add_argument("--skip-dovetail", action="store_true", help="only run peers; Dovetail's figures are known")
    for peer in ("vllm", "transformers"):
        parser.add_argument(f"--{peer}", metavar="PYTHON", help=f"measure {peer} with this interpreter")
        parser.add_argument(f"--{peer}-only", metavar="WORKLOADS", help="fewer of them")
    arguments = parser.parse_args()
    config = json.loads((arguments.model / "config.json").read_text())
    device, names = device_name(), arguments.only.split(",")
    results = Results(arguments.results, arguments.model.name, device)
    pythons = {"dovetail": None if arguments.skip_dovetail else sys.executable}
    pythons |= {"vllm": arguments.vllm, "transformers": arguments.transformers}
    for engine, python in pythons.items():
        chosen = getattr(arguments, f"{engine}_only", None)
        runs = results.missing(engine, chosen.split(",") if chosen else names, arguments.repetitions)
        if not (python and runs):
            continue
        job = {
            "model": str(arguments.model),
            "vocab": config["vocab_size"],
            "deadline": arguments.deadline,
            "runs": runs,
            "ceilings": engine == "dovetail",
            "options": arguments.options if engine == "dovetail" else {},
        }
        for line in measure(engine, python, job, arguments.cache):
            results.add(engine, line)
    print("\n".join(Report(results, list(ENGINES), Shape.of(config), device).lines(names, arguments.model.name)))


if __name__ == "__main__":
    main()
