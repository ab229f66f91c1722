"""Offline workloads on one GPU, with weights that only have a model's shapes, beside what the device can do.

    python benchmarks/gpu/bench.py benchmarks/gpu/llama8b [--only W2,W3] [--profile]

Prints a line of JSON for the ceilings measured in this run, for the start, and for each workload.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

START = time.perf_counter()

import torch  # noqa: E402  importing is part of the start

from dovetail import LLM, SamplingParams  # noqa: E402


@dataclass(frozen=True)
class Workload:
    """``requests`` prompts of ``shared + unique`` tokens, each continued by ``out`` greedy tokens."""

    requests: int
    shared: int
    unique: int
    out: int

    def prompts(self, vocab: int, seed: int) -> list[list[int]]:
        """Fresh ids for each seed, so that no prefix is cached from one repetition to the next."""
        rng = random.Random(seed)
        head = [rng.randrange(1000, vocab - 1000) for _ in range(self.shared)]
        return [head + [rng.randrange(1000, vocab - 1000) for _ in range(self.unique)] for _ in range(self.requests)]


WORKLOADS = {
    "W3": Workload(requests=1, shared=0, unique=128, out=256),
    "W2": Workload(requests=64, shared=0, unique=128, out=512),
    "W4": Workload(requests=64, shared=0, unique=2048, out=1),
    "W1": Workload(requests=512, shared=0, unique=512, out=128),
    "W5": Workload(requests=256, shared=1024, unique=64, out=64),
}


@dataclass(frozen=True)
class Shape:
    """What a step of a dense decoder reads and computes, counted from config.json.

    Attributes:
        linears: weights of all layers' products, without the output head.
        head: weights of the output head.
        kv_bytes: of one token in all layers.
    """

    linears: int
    head: int
    kv_bytes: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """Count."""
        width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
        heads, kv_heads, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        layer = width * size * (2 * heads + 2 * kv_heads) + 3 * width * inner
        return cls(layers * layer, width * config["vocab_size"], layers * 2 * kv_heads * size * 2)

    def floor(self, work: Workload, read: float, flops: float) -> float:
        """Seconds below which nothing gets: prompts at the matrix rate, decode steps at that or the memory's."""
        unique = work.shared + work.requests * work.unique
        seconds = 2 * self.linears * unique / flops + 2 * self.head * work.requests / flops
        length = work.shared + work.unique + work.out / 2
        moved = 2 * (self.linears + self.head) + work.requests * length * self.kv_bytes
        computed = 2 * (self.linears + self.head) * work.requests
        return seconds + (work.out - 1) * max(moved / read, computed / flops)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", default=",".join(WORKLOADS))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="of decode steps at batch 64")
    parser.add_argument("--options", type=json.loads, default={}, help="of the engine, as JSON")
    arguments = parser.parse_args()
    config = json.loads((arguments.model / "config.json").read_text())
    begun = time.perf_counter()
    llm = LLM(
        str(arguments.model),
        **{
            "load_format": "dummy",
            "tokenizer": str(files("dovetail_models") / "checkpoints/fable-4m"),  # any will do: ids go in and come out
            "dtype": "bfloat16",
            "max_model_len": 4096,
            "max_num_seqs": 512,
            "max_num_batched_tokens": 8192,
            **arguments.options,
        },
    )
    ready = time.perf_counter()
    emit(workload="start", process_s=ready - START, engine_s=ready - begun)
    read, flops = ceilings()
    emit(workload="ceilings", device=torch.cuda.get_device_name(), read_gb_s=read / 1e9, bf16_tflop_s=flops / 1e12)
    runs = Runs(llm, config["vocab_size"])
    for name in arguments.only.split(","):
        floor = Shape.of(config).floor(WORKLOADS[name], read, flops)
        emit(workload=name, **runs.measure(WORKLOADS[name], arguments.repetitions, floor))
    if arguments.profile:
        profile(runs)


class Runs:
    """Workloads on one engine."""

    def __init__(self, llm: LLM, vocab: int) -> None:
        self._llm = llm
        self._vocab = vocab
        self._seed = 0

    def once(self, work: Workload, out: int) -> float:
        """Seconds of one repetition."""
        self._seed += 1
        params = SamplingParams(temperature=0.0, max_tokens=out, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": ids} for ids in work.prompts(self._vocab, self._seed)]
        begun = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begun
        assert all(len(output.outputs[0].token_ids) == out for output in outputs)
        return seconds

    def measure(self, work: Workload, repetitions: int, floor: float) -> dict[str, Any]:
        """Medians, after a short run that compiles and captures."""
        self.once(work, min(work.out, 8))
        totals = [self.once(work, work.out) for _ in range(repetitions)]
        total = statistics.median(totals)
        result: dict[str, Any] = {"total_s": total, "all_s": totals}
        if work.out > 1:
            first = statistics.median(self.once(work, 1) for _ in range(repetitions))
            result |= {"first_token_ms": 1e3 * first, "step_ms": 1e3 * (total - first) / (work.out - 1)}
        return {**result, "output_tok_s": work.requests * work.out / total, "floor_s": floor, "of_floor": floor / total}


def ceilings() -> tuple[float, float]:
    """Bytes per second that a sum reads, and operations per second of a large bf16 product."""
    values = torch.empty(1 << 28, dtype=torch.int64, device="cuda").random_()
    read = values.nbytes / seconds_of(values.sum)
    del values
    size = 8192
    x, y = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return read, 2 * size**3 / seconds_of(lambda: x @ y)


def seconds_of(run: Any, times: int = 10) -> float:
    """Of one call on the device."""
    for _ in range(3):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def profile(runs: Runs) -> None:
    """Where the device's and the host's time goes in decode steps at batch 64."""
    work, steps = Workload(requests=64, shared=0, unique=128, out=1), 33
    runs.once(work, steps)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        seconds = runs.once(work, steps)
    averages = profiler.key_averages()
    busy = sum(event.self_device_time_total for event in averages if event.device_type.name == "CUDA") / 1e6
    emit(workload="profile", steps=steps, seconds=seconds, device_busy_s=busy)
    print(averages.table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=80))
    print(averages.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))


def emit(**numbers: Any) -> None:
    """One line."""
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in numbers.items()}
    print(json.dumps(rounded), flush=True)


if __name__ == "__main__":
    main()
