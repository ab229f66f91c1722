"""How much of a decode step the device waits for the host, from a trace of steps at batch 64.

    python benchmarks/gpu/host_gap.py benchmarks/gpu/llama8b [--requests 64] [--kernels 15]

Kernels of one step follow each other within a few microseconds; where the device is idle for longer, it waits for the
host. Tracing slows the host down, so the device waits more often than it would; what a step without a trace takes, less
what the device is busy in it and pauses between kernels, is what it waits for the host in truth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "engines"))
from engine_dovetail import load
from worker import Worker
from workloads import Workload

WAIT_US = 5.0
"""Idle for longer than this, the device waits for the host."""
STEPS = 67
"""No number of layers divides it or its neighbours, so that a kernel that runs as often runs once per step."""
AFTER_PROMPTS = 2


@dataclass(frozen=True)
class Activity:
    """What the device did, microseconds."""

    name: str
    begin: float
    end: float


def trace(worker: Worker, work: Workload) -> list[Activity]:
    """Everything that ran on the device during one run, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        worker.seconds(work, "traced")
    events = [event for event in profiler.events() or () if event.device_type.name == "CUDA"]
    found = [Activity(event.name, event.time_range.start, event.time_range.end) for event in events]
    return sorted(found, key=lambda activity: activity.begin)


def step_marks(activities: list[Activity], steps: int) -> list[float]:
    """When each step began: a kernel that runs once per step tells.

    Raises:
        SystemExit: there is none.
    """
    begins: dict[str, list[float]] = defaultdict(list)
    for activity in activities:
        begins[activity.name].append(activity.begin)
    for marks in begins.values():
        if abs(len(marks) - steps) <= 1:
            return marks[AFTER_PROMPTS:]
    counts = sorted({name: len(marks) for name, marks in begins.items()}.items(), key=lambda item: item[1])
    raise SystemExit(f"No kernel ran once in each of {steps} steps: {counts}")


def idle(activities: list[Activity], begin: float, end: float) -> list[float]:
    """Lengths of the pauses between ``begin`` and ``end``."""
    pauses, busy_until = [], begin
    for activity in activities:
        if activity.end <= begin or activity.begin >= end:
            continue
        if activity.begin > busy_until:
            pauses.append(activity.begin - busy_until)
        busy_until = max(busy_until, activity.end)
    return pauses


def report(activities: list[Activity], marks: list[float], untraced_us: float, kernels: int) -> None:
    """Print the step's parts and the kernels that take most of it."""
    begin, end, steps = marks[0], marks[-1], len(marks) - 1
    step = (end - begin) / steps
    pauses = idle(activities, begin, end)
    waits = [pause for pause in pauses if pause > WAIT_US]
    between, within = sum(waits) / steps, (sum(pauses) - sum(waits)) / steps
    periods = [after - before for before, after in pairwise(marks)]
    busy = step - between - within
    gap = max(0.0, untraced_us - busy - within)
    print(f"{torch.cuda.get_device_name()}, {steps} decode steps; a step takes {untraced_us:.0f} µs:")
    print(
        f"  busy {busy:.0f} µs, pauses between kernels {within:.0f} µs, waiting for the host {gap:.0f} µs: "
        f"{busy / untraced_us:.1%}, {within / untraced_us:.1%}, {gap / untraced_us:.1%}"
    )
    print(
        f"  traced, {step:.0f} µs (median {statistics.median(periods):.0f}), of which waiting {between:.0f}: "
        f"{len(waits) / steps:.1f} waits per step, the longest {max(waits, default=0):.0f} µs"
    )
    spent: dict[str, list[float]] = defaultdict(list)
    for activity in activities:
        if begin <= activity.begin < end:
            spent[activity.name].append(activity.end - activity.begin)
    for name, times in sorted(spent.items(), key=lambda item: -sum(item[1]))[:kernels]:
        print(f"  {sum(times) / steps:8.1f} µs {len(times) / steps:6.1f} × {name[:90]}")


def main() -> None:
    """Trace one run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--kernels", type=int, default=15, help="to list, those that take most first")
    parser.add_argument("--options", type=json.loads, default={}, help="of the engine, as JSON")
    arguments = parser.parse_args()
    vocab = json.loads((arguments.model / "config.json").read_text())["vocab_size"]
    worker = Worker(load(str(arguments.model), arguments.options), vocab)
    work = Workload("decode", requests=arguments.requests, shared=0, unique=128, out=STEPS)
    worker.seconds(work, "warm")
    totals = [worker.seconds(work, f"whole {i}") - worker.seconds(work.first(), f"first {i}") for i in range(3)]
    untraced = 1e6 * statistics.median(totals) / (work.out - 1)
    activities = trace(worker, work)
    report(activities, step_marks(activities, work.out), untraced, arguments.kernels)


if __name__ == "__main__":
    main()
