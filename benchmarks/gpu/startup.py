"""From process start to the first answer, with an empty kernel cache and with the one that the first start left.

    python benchmarks/gpu/startup.py benchmarks/gpu/llama8b [--vllm PYTHON] [--starts 3]

The folders that engines keep compiled kernels in are moved to an empty one for each engine; the driver's own, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from bench import device_name, measure


def start(engine: str, python: str, model: Path, cache: Path, options: dict[str, object]) -> dict[str, float]:
    """Seconds until the engine was loaded, and until it had answered."""
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    job = {"model": str(model), "vocab": vocab, "deadline": 300.0, "runs": [], "ceilings": False, "options": options}
    lines = list(measure(engine, python, job, cache))
    ready = next((line for line in lines if "ready_s" in line), None)
    if ready is None:
        raise SystemExit(f"{engine} did not start: {lines}")
    return {"loaded_s": ready["loaded_s"], "ready_s": ready["ready_s"]}


def main() -> None:
    """Print a line per start."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--starts", type=int, default=3, help="with a warm cache; there is one with an empty one")
    parser.add_argument("--options", type=json.loads, default={}, help="of Dovetail's engine, as JSON")
    parser.add_argument(
        "--cache", type=Path, help="a folder for what is compiled; empty, or the first start is warm too"
    )
    parser.add_argument("--vllm", metavar="PYTHON", help="measure vllm with this interpreter")
    arguments = parser.parse_args()
    print(f"{arguments.model.name} on {device_name()}; process start → loaded, → first answer")
    for engine, python in (("dovetail", sys.executable), ("vllm", arguments.vllm)):
        if python is None:
            continue
        options = arguments.options if engine == "dovetail" else {}
        with tempfile.TemporaryDirectory() as folder:
            cache = arguments.cache or Path(folder)
            runs = [start(engine, python, arguments.model, cache, options) for _ in range(1 + arguments.starts)]
        for title, some in (("empty cache", runs[:1]), ("warm cache, median", runs[1:])):
            loaded, ready = (statistics.median(run[key] for run in some) for key in ("loaded_s", "ready_s"))
            print(f"{engine:<10} {title:<20} {loaded:6.1f} s {ready:6.1f} s   ({len(some)})", flush=True)


if __name__ == "__main__":
    main()
