"""What an engine's worker process does: load, then answer one JSON line per request on standard input.

In: ``{"prompts": [[ids]], "out": n}``. Out: ``{"wall_s", "ttft_s", "tpot_s", "head", "pss_mb"}``; the first line says
``{"ready": seconds, "version": …}``. Anything else that the engine prints goes to standard error.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""Greedy tokens for each prompt, exactly ``out`` of them."""
Stream = Callable[[list[int], int], list[float]]
"""The times (``perf_counter``) at which each token of one prompt was known."""


def serve(load: Callable[[], tuple[str, Generate, Stream]]) -> None:
    """Run the worker loop."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    start = time.perf_counter()
    version, generate, stream = load()
    _reply(replies, {"ready": time.perf_counter() - start, "version": version})
    for line in sys.stdin:
        job = json.loads(line)
        _reply(replies, _run(job["prompts"], job["out"], generate, stream))


def _run(prompts: list[list[int]], out: int, generate: Generate, stream: Stream) -> dict[str, Any]:
    start = time.perf_counter()
    if len(prompts) == 1:
        times = stream(prompts[0], out)
        assert len(times) == out, len(times)
        return {
            "wall_s": times[-1] - start,
            "ttft_s": times[0] - start,
            "tpot_s": (times[-1] - times[0]) / (out - 1),
            "pss_mb": pss_mb(),
        }
    tokens = generate(prompts, out)
    wall = time.perf_counter() - start
    assert all(len(ids) == out for ids in tokens), [len(ids) for ids in tokens]
    return {"wall_s": wall, "head": tokens[0][:8], "pss_mb": pss_mb()}


def pss_mb() -> float:
    """Proportional set size of this process and its children, MB."""
    pids = [os.getpid(), *_children(os.getpid())]
    total = 0
    for pid in pids:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total / 1024


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found += [child, *_children(child)]
    return found


def _reply(replies: Any, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()
