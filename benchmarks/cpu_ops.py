"""The CPU platform's operations against this machine's own limits, and a whole step built from them.

Prints, per operation, its time and what share it reaches of the memory bandwidth or of the multiply rate, both measured
in the same run. Times are the least of several runs: other programs only ever add.

    python benchmarks/cpu_ops.py [--dtype bfloat16] [--threads N] [--context 192]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.contracts.attention import AttentionSpec, StepTensors
from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import PlatformConfig
from dovetail.ops.sampling import SamplingTensors
from dovetail.platforms.cpu import machine
from dovetail.platforms.cpu.attention import CpuAttention
from dovetail.platforms.cpu.pages import zeroed
from dovetail.platforms.cpu.platform import CpuPlatform

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD, INNER, VOCAB = 768, 12, 12, 4, 64, 2048, 32000
SPEC = AttentionSpec(num_heads=HEADS, num_kv_heads=KV_HEADS, head_size=HEAD, scale=HEAD**-0.5)
BLOCK = 16
GREEDY = SamplingTensors(
    **dict.fromkeys(("temperature_S", "top_k_S", "top_p_S", "min_p_S", "seeds_S", "positions_S"), torch.zeros(0)),
    all_greedy=True,
    any_filter=False,
)
SHAPES = {
    "qkv": (HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD),
    "output": (HEADS * HEAD, HIDDEN),
    "gate_up": (HIDDEN, 2 * INNER),
    "down": (INNER, HIDDEN),
}


def least(run: Callable[[], object], seconds: float) -> float:
    """Least time of one call, over about ``seconds``."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def bandwidth(threads: int) -> float:
    """Bytes per second that all threads read, from data much larger than the caches."""
    data = zeroed(512 << 20).fill_(1).view(torch.int64)
    torch.set_num_threads(threads)
    seconds = least(data.max, 2)
    torch.set_num_threads(1)
    return data.nbytes / seconds


def multiply_rate(ops: OpTable, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a matrix product that fits the caches."""
    x, packed = torch.randn(96, 512, dtype=dtype), ops.linear_pack(torch.randn(512, 512, dtype=dtype))
    return 2 * 96 * 512 * 512 / least(lambda: ops.linear(x, packed), 1)


@dataclass
class Layer:
    """One decoder layer's weights and cache."""

    packed: dict[str, object]
    cache: object
    norm_D: Tensor


class Synthetic:
    """A model of the measured shape with random weights, without an engine around it."""

    def __init__(self, ops: OpTable, dtype: torch.dtype, blocks: int) -> None:
        self.ops = ops
        self.dtype = dtype
        self.attention = CpuAttention(
            ops=ops, device=torch.device("cpu"), dtype=dtype, kv_dtype=dtype, block_size=BLOCK
        )
        self.layers = [
            Layer(
                {name: self.packed(*shape) for name, shape in SHAPES.items()},
                self.attention.allocate(SPEC, blocks),
                torch.ones(HIDDEN, dtype=dtype),
            )
            for _ in range(LAYERS)
        ]
        self.head = self.packed(HIDDEN, VOCAB)
        self.table_VD = torch.randn(VOCAB, HIDDEN).to(dtype)
        self.cos_sin_PK = torch.randn(8192, HEAD)

    def packed(self, inputs: int, outputs: int) -> object:
        return self.ops.linear_pack((torch.randn(outputs, inputs) * inputs**-0.5).to(self.dtype))

    def step(self, tensors: StepTensors) -> Tensor:
        ops, heads = self.ops, [HEADS, KV_HEADS, KV_HEADS]
        metadata = self.attention.build_metadata(tensors, 0)
        x, residual = ops.embedding(tensors.token_ids_T, self.table_VD), None
        for layer in self.layers:
            packed, norm = layer.packed, layer.norm_D
            if residual is None:
                x, residual = ops.rms_norm(x, norm, 1e-5), x
            else:
                x, residual = ops.add_rms_norm(x, residual, norm, 1e-5)
            q, k, v = ops.linear(x, packed["qkv"]).view(-1, sum(heads), HEAD).split_with_sizes(heads, 1)
            q, k = ops.rotary(q, k, tensors.positions_T, self.cos_sin_PK)
            x = self.attention.forward(q, k, v, layer.cache, metadata, SPEC)
            x, residual = ops.add_rms_norm(ops.linear(x, packed["output"]), residual, norm, 1e-5)
            x = ops.linear(ops.silu_and_mul(ops.linear(x, packed["gate_up"])), packed["down"])
        x, _ = ops.add_rms_norm(x, residual, norm, 1e-5)
        return ops.sample(ops.linear(x[tensors.logits_rows_S], self.head), GREEDY)


def tables(requests: int, queries: int, context: int) -> StepTensors:
    """A step of ``requests`` requests with ``queries`` new tokens each, after which each has ``context`` tokens."""
    width = -(-context // BLOCK)
    table = torch.arange(1, requests * width + 1, dtype=torch.int32).view(requests, width)
    positions = torch.arange(context - queries, context).repeat(requests)
    request = torch.arange(requests).repeat_interleave(queries)
    slots = table[request, positions // BLOCK].long() * BLOCK + positions % BLOCK
    return StepTensors(
        token_ids_T=torch.randint(0, VOCAB, (requests * queries,)),
        positions_T=positions,
        query_start_R1=torch.arange(requests + 1, dtype=torch.int32) * queries,
        seq_lens_R=torch.full((requests,), context, dtype=torch.int32),
        block_tables=[table],
        slot_mapping=[slots],
        logits_rows_S=torch.arange(1, requests + 1) * queries - 1,
        max_query_len=queries,
        max_seq_len=context,
    )


def operations(model: Synthetic, step: StepTensors, read: float, rate: float) -> None:
    """Every operation of the step alone; linear layers cycle through all layers' weights, so they come from memory."""
    ops, dtype, tokens = model.ops, model.dtype, len(step.token_ids_T)
    size, norm = dtype.itemsize, torch.ones(HIDDEN, dtype=dtype)
    x = torch.randn(tokens, HIDDEN).to(dtype)
    qkv = torch.randn(tokens, HEADS + 2 * KV_HEADS, HEAD).to(dtype)
    q, k, v = qkv.split_with_sizes([HEADS, KV_HEADS, KV_HEADS], 1)
    gate_up = torch.randn(tokens, 2 * INNER).to(dtype)
    metadata = model.attention.build_metadata(step, 0)
    context, queries = step.max_seq_len, step.max_query_len
    pairs = len(step.seq_lens_R) * (queries * context - queries * (queries - 1) // 2)
    kv_bytes = int(step.seq_lens_R.sum()) * 2 * KV_HEADS * HEAD * size
    row = tokens * HIDDEN * size
    rows: list[tuple[str, Callable[[], object], float, float]] = [
        ("add_rms_norm", lambda: ops.add_rms_norm(x, x, norm, 1e-5), 4 * row, 0),
        ("rotary", lambda: ops.rotary(q, k, step.positions_T, model.cos_sin_PK), 2 * (q.nbytes + k.nbytes), 0),
        ("silu_and_mul", lambda: ops.silu_and_mul(gate_up), 1.5 * gate_up.nbytes, 0),
        (
            "attention",
            lambda: [model.attention.forward(q, k, v, layer.cache, metadata, SPEC) for layer in model.layers],
            LAYERS * kv_bytes,
            LAYERS * 4 * pairs * HEADS * HEAD,
        ),
    ]
    for name, (inputs, outputs) in SHAPES.items():
        given = torch.randn(tokens, inputs).to(dtype)

        def linear(name: str = name, given: Tensor = given) -> None:
            for layer in model.layers:
                ops.linear(given, layer.packed[name])

        weights = LAYERS * inputs * outputs
        rows.append((name, linear, weights * size, 2 * tokens * weights))
    last = x[: len(step.seq_lens_R)]
    head = HIDDEN * VOCAB
    rows.append(("head", lambda: ops.linear(last, model.head), head * size, 2 * len(last) * head))
    print(f"  {'operation':<14}{'µs':>9}{'GB/s':>8}{'of peak':>9}{'GFLOP/s':>9}{'of peak':>9}")
    for name, run, num_bytes, flops in rows:
        calls = LAYERS if name in SHAPES or name == "attention" else 1
        seconds = least(run, 0.4)
        line = f"  {name:<14}{seconds / calls * 1e6:>9.1f}{num_bytes / seconds / 1e9:>8.1f}"
        line += f"{num_bytes / seconds / read:>9.0%}{flops / seconds / 1e9:>9.0f}{flops / seconds / rate:>9.0%}"
        print(line)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--context", type=int, default=192)
    parser.add_argument("--steps-only", action="store_true")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    threads = arguments.threads or machine.usable_cores()
    platform = CpuPlatform(PlatformConfig(num_threads=threads))
    ops = OpTable.resolve(platform.ops(dtype), "cpu")
    read, rate = bandwidth(threads), multiply_rate(ops, dtype)
    print(", ".join(f"{key}: {value}" for key, value in CpuPlatform.probe().facts.items()))
    print(f"{threads} threads, {dtype}; reads {read / 1e9:.1f} GB/s, multiplies {rate / 1e9:.0f} GFLOP/s")
    model = Synthetic(ops, dtype, 1 + 64 * -(-max(arguments.context, 512) // BLOCK))
    weights = LAYERS * sum(i * o for i, o in SHAPES.values())
    for name, requests, queries, context in (
        ("decode, 1 request", 1, 1, arguments.context),
        ("decode, 8 requests", 8, 1, arguments.context),
        ("decode, 32 requests", 32, 1, arguments.context),
        ("prefill, 4 × 512", 4, 512, 512),
    ):
        step = tables(requests, queries, context)
        seconds = least(lambda step=step: model.step(step), 3)
        tokens, logits = requests * queries, requests
        flops = 2 * tokens * weights + 2 * logits * HIDDEN * VOCAB
        floor = max((weights + HIDDEN * VOCAB) * dtype.itemsize / read, flops / rate)
        print(
            f"{name}: {seconds * 1e3:.2f} ms per step, {tokens / seconds:.0f} tok/s; "
            f"the weights alone need {floor * 1e3:.2f} ms at peak ({floor / seconds:.0%})"
        )
        if not arguments.steps_only:
            operations(model, step, read, rate)


if __name__ == "__main__":
    main()
