"""What one step costs outside the executor: ``plan`` plus ``commit`` with every request decoding.

Run ``python benchmarks/scheduler_step.py``. The executor costs nothing and answers one token per request, so the time
is the scheduler's own: bookkeeping, block allocation, hashing of full blocks, stop checks and output deltas. The last
column is the ratio to a bare Python loop over the same requests that only appends a token to a list and a float to
another, measured in the same run: it says how far from "nothing" the scheduler is on any machine.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

from dovetail.contracts.executor import ExecutorInfo, KVGroup
from dovetail.messages import StepPlan, StepResult
from dovetail.scheduler.scheduler import Scheduler
from dovetail.testing import engine_config, engine_request

BUDGET = 8192
GROUPS = {
    "full": (KVGroup(layers=(0,)),),
    "full + 3 windows of 128": (KVGroup(layers=(0,)), *(KVGroup(layers=(i,), window=128) for i in range(1, 4))),
}


def instant_result(plan: StepPlan, num_drafts: int) -> StepResult:
    """Token 1 for whoever samples; half of the drafts are right."""
    return StepResult(
        step=plan.step,
        token_ids=[
            [1] * (1 + len(drafts) // 2) if samples else []
            for samples, drafts in zip(plan.samples, plan.drafts, strict=True)
        ],
        drafts=[[1] * num_drafts for _ in plan.slots],
        logprobs=[None] * len(plan.slots),
        prompt_logprobs=[None] * len(plan.slots),
    )


def measure(requests: int, context: int, steps: int, groups: tuple[KVGroup, ...], num_drafts: int) -> list[float]:
    """Seconds of plan + commit per decode step."""
    prefill_steps = requests * context // BUDGET + 8
    length = context + (prefill_steps + steps) * (1 + num_drafts)
    config = engine_config(
        max_model_len=length + 1, max_num_seqs=requests, max_num_batched_tokens=BUDGET, block_size=16, vocab_size=50_000
    )
    pages = -(-length // 16) + 1
    info = ExecutorInfo(num_blocks=requests * pages * len(groups) + 1, block_size=16, groups=groups)
    scheduler = Scheduler(config, info)
    for index in range(requests):
        prompt = [(index * 7919 + position) % 50_000 for position in range(context)]
        scheduler.add(engine_request(prompt, max_tokens=None, ignore_eos=True))
    while True:
        plan = scheduler.plan()
        assert plan is not None
        scheduler.commit(plan, instant_result(plan, num_drafts))
        if len(plan.slots) == requests and all(plan.samples) and not plan.new_rows:
            break
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        plan = scheduler.plan()
        planned = time.perf_counter()
        assert plan is not None
        result = instant_result(plan, num_drafts)
        committing = time.perf_counter()
        deltas = scheduler.commit(plan, result)
        seconds.append(planned - start + time.perf_counter() - committing)
        assert len(deltas) == requests
    return seconds


def bare_loop(requests: int) -> float:
    """Seconds of the least that Python can do per request."""
    tokens: list[list[int]] = [[] for _ in range(requests)]
    columns: list[float] = []
    start = time.perf_counter()
    for _ in range(100):
        for own in tokens:
            own.append(1)
            columns.append(1.0)
    return (time.perf_counter() - start) / 100


def main() -> None:
    """Print one line per workload."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    bare = statistics.median(bare_loop(args.requests) for _ in range(50))
    print(f"{args.requests} running requests, {args.steps} steps, prefix caching on, blocks of 16; ms per step")
    print(f"{'workload':<50}{'median':>8}{'p99':>8}{'max':>8}{'× bare loop':>13}")
    for context in (32, 512, 4096):
        for name, groups in GROUPS.items():
            for num_drafts in (0, 3):
                gc.collect()
                seconds = sorted(measure(args.requests, context, args.steps, groups, num_drafts))
                median, p99 = statistics.median(seconds), seconds[len(seconds) * 99 // 100]
                label = f"context {context}, {name}" + (f", {num_drafts} drafts" if num_drafts else "")
                print(
                    f"{label:<50}{median * 1e3:>8.3f}{p99 * 1e3:>8.3f}{seconds[-1] * 1e3:>8.3f}{median / bare:>13.1f}"
                )


if __name__ == "__main__":
    main()
