"""What a decode step of the TPU platform costs on the host, outside of the call of its program.

Run ``JAX_PLATFORMS=cpu python benchmarks/tpu/host_step.py``, or without the variable on a machine with a TPU. Executed
on the host, the program itself says nothing about a chip; scheduler, tables, packing, fetching, bookkeeping and
detokenizing are what they are there. Times are medians over steps in which every request decodes:

* step: the engine's step, from plan to deltas;
* program: from the call until its results are ready, which a chip would do in its own time;
* of it call: until the call returned: handing over several hundred arrays;
* host: the step without the program.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import jax

from dovetail import LLM, SamplingParams
from dovetail.engine.engine import Engine
from dovetail_tpu import bridges

DEMO = str(files("dovetail_models") / "checkpoints/fable-4m")
TARGET_MS = 1.0


class Watch:
    """Seconds of each step, of the calls in it, and of what they take to return."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float, float]] = []
        self._ready = self._returned = 0.0
        bridge: Any = bridges.current()
        bridge.call = self._watched(bridge.call)
        self._step = Engine.step

        def step(engine: Engine) -> Any:  # as a method, it is given the engine
            return self._timed(engine)

        Engine.step = step  # type: ignore[method-assign]

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            start = time.perf_counter()
            results = call(*given)
            self._returned += time.perf_counter() - start
            jax.block_until_ready(results)
            self._ready += time.perf_counter() - start
            return results

        return run

    def _timed(self, engine: Engine) -> Any:
        self._ready = self._returned = 0.0
        start = time.perf_counter()
        deltas = self._step(engine)
        self.steps.append((time.perf_counter() - start, self._ready, self._returned))
        return deltas


def main() -> None:
    """Print one line per number of requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    limits = {"max_num_seqs": max(given.requests), "max_num_batched_tokens": 64, "max_model_len": given.steps + 64}
    with LLM(given.model, platform="tpu", attention="tpu-gather", dtype="float32", **limits) as llm:
        watch = Watch()
        print("requests  step ms  program ms  of it call ms  host ms")
        for requests in given.requests:
            params = SamplingParams(temperature=0.8, max_tokens=given.steps, ignore_eos=True, seed=1)
            watch.steps.clear()
            llm.generate(["Once upon a time"] * requests, params, use_tqdm=False)
            decodes = watch.steps[len(watch.steps) // 4 :]
            step, program, call = (1e3 * statistics.median(column) for column in zip(*decodes, strict=True))
            host = 1e3 * statistics.median(whole - ready for whole, ready, _ in decodes)
            verdict = "" if host <= TARGET_MS else f"  above {TARGET_MS} ms"
            print(f"{requests:8}  {step:7.3f}  {program:10.3f}  {call:13.3f}  {host:7.3f}{verdict}")


if __name__ == "__main__":
    main()
