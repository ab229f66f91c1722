"""Dovetail against its peers on one CPU, in one run: engines take turns on every repetition, and ratios are medians.

    python benchmarks/cpu/compare.py MODEL --vllm PYTHON --llama-cpp PYTHON --transformers PYTHON

A peer is measured when the Python of its own environment is given; README.md here says how to make them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from workloads import WORKLOADS, Workload

HERE = Path(__file__).parent
SINGLE_STREAM_ONLY = {"llama.cpp"}


class Engine:
    """A worker process."""

    def __init__(self, name: str, python: str, script: str, arguments: list[str]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [python, str(HERE / script), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with status {self.process.wait()}; its own output says why.")
        return json.loads(line)

    def run(self, workload: Workload, repetition: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        job = {"prompts": workload.prompts(repetition), "out": workload.out}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self.read()

    def takes(self, workload: Workload) -> bool:
        return workload.requests == 1 or self.name not in SINGLE_STREAM_ONLY

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def measure(engines: list[Engine], workload: Workload, repetitions: int) -> dict[str, dict[str, float]]:
    """Medians per engine; repetition -1 warms up."""
    runs: dict[str, list[dict[str, Any]]] = {engine.name: [] for engine in engines}
    for repetition in range(-1, repetitions):
        for engine in engines:
            if engine.takes(workload):
                reply = engine.run(workload, repetition)
                if repetition >= 0:
                    runs[engine.name].append(reply)
    return {name: _medians(replies) for name, replies in runs.items() if replies}


def _medians(replies: list[dict[str, Any]]) -> dict[str, float]:
    keys = [key for key in replies[0] if key.endswith("_s") or key == "pss_mb"]
    return {key: statistics.median(reply[key] for reply in replies) for key in keys}


def show(workload: Workload, medians: dict[str, dict[str, float]], console: Console) -> None:
    """Print absolute figures for the record and ratios to Dovetail."""
    tokens = workload.requests * (workload.shared + workload.unique + workload.out)
    size = f"({workload.shared}+{workload.unique} in, {workload.out} out)"
    table = Table(title=f"{workload.name}: {workload.requests} × {size}")
    for column in ("engine", "wall s", "tokens/s", "ms/token", "TTFT ms", "PSS MB", "Dovetail is × as fast"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    ours = medians["dovetail"]
    for name, m in medians.items():
        key = "tpot_s" if "tpot_s" in ours else "wall_s"
        table.add_row(
            name,
            f"{m['wall_s']:.3f}",
            f"{tokens / m['wall_s']:,.0f}",
            f"{1e3 * m['tpot_s']:.2f}" if "tpot_s" in m else "",
            f"{1e3 * m['ttft_s']:.0f}" if "ttft_s" in m else "",
            f"{m['pss_mb']:,.0f}",
            f"{m[key] / ours[key]:.2f}",
        )
    console.print(table)


def machine() -> str:
    """The machine, in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{model}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {time.strftime('%F')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--json", type=Path, help="also write the medians here")
    for peer in ("vllm", "llama-cpp", "transformers"):
        parser.add_argument(f"--{peer}", metavar="PYTHON", help=f"measure {peer} with this interpreter")
    options = parser.parse_args()
    arguments = [options.model, options.dtype, str(options.threads)]
    chosen = [("dovetail", sys.executable, "engine_dovetail.py")]
    for name, python, script in (
        ("vLLM", options.vllm, "engine_vllm.py"),
        ("llama.cpp", options.llama_cpp, "engine_llama_cpp.py"),
        ("transformers", options.transformers, "engine_transformers.py"),
    ):
        if python:
            chosen.append((name, python, script))
    console = Console()
    console.print(machine())
    engines, results = [], {}
    try:
        for name, python, script in chosen:  # one after another: loading in parallel would compete for the cores
            engine = Engine(name, python, script, arguments)
            engines.append(engine)
            ready = engine.read()
            console.print(f"{name} {ready['version']}: import and load {ready['ready']:.1f} s")
        for name in options.workloads.split(","):
            results[name] = measure(engines, WORKLOADS[name], options.repetitions)
            show(WORKLOADS[name], results[name], console)
    finally:
        for engine in engines:
            engine.close()
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
