"""Linear layers of the CPU platform with 8-bit weights, against the same layers in the activations' own dtype.

Each row of the table is one number of tokens; entries are times of the plain layer over those of the quantized one,
with the quantization of activations included. Layers are cycled through, so that weights come from beyond the caches of
the cores. Times are the least of several runs, and formats take turns: other programs disturb all of them alike.

    python benchmarks/cpu_quantized.py [--dtype bfloat16] [--threads N] [--inputs 4096] [--outputs 4096]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import PlatformConfig
from dovetail.platforms.cpu import machine
from dovetail.platforms.cpu.platform import CpuPlatform

LAYERS = 4
TOKENS = (1, 4, 16, 128, 512)
BLOCK = 128
Product = Callable[[Tensor], object]


def plain(ops: OpTable, weight_OI: Tensor) -> Product:
    """The layer in the dtype of the weight."""
    packed = ops.linear_pack(weight_OI)
    return lambda x: ops.linear(x, packed)


def weight_only(ops: OpTable, weight_OI: Tensor, code: torch.dtype) -> Product:
    """8-bit weights."""
    packed = ops.weight_only_pack(*ops.quantize_rows(weight_OI, code))
    return lambda x: ops.weight_only_mm(x, packed)


def w8a8(ops: OpTable, weight_OI: Tensor, code: torch.dtype) -> Product:
    """8-bit weights and activations."""
    values_OI, scale_O1 = ops.quantize_rows(weight_OI, code)
    packed = ops.scaled_mm_pack(values_OI)

    def run(x: Tensor) -> Tensor:
        values_TI, scale_T1 = ops.quantize_rows(x, code)
        return ops.scaled_mm(values_TI, packed, scale_T1, scale_O1, x.dtype)

    return run


def blocks(ops: OpTable, weight_OI: Tensor, code: torch.dtype) -> Product:
    """8-bit weights and activations, scaled in blocks of inputs."""
    packed = ops.block_scaled_pack(*ops.quantize_rows(weight_OI, code, BLOCK), BLOCK)

    def run(x: Tensor) -> Tensor:
        values_TI, scale_TG = ops.quantize_rows(x, code, BLOCK)
        return ops.block_scaled_mm(values_TI, packed, scale_TG, x.dtype)

    return run


FORMATS: Mapping[str, Callable[[OpTable, Tensor], Product]] = {
    "plain": plain,
    "int8": partial(weight_only, code=torch.int8),
    "fp8": partial(weight_only, code=torch.float8_e4m3fn),
    "int8-w8a8": partial(w8a8, code=torch.int8),
    "fp8-w8a8": partial(w8a8, code=torch.float8_e4m3fn),
    "fp8 blocks": partial(blocks, code=torch.float8_e4m3fn),
}


def times(layers: Mapping[str, list[Product]], x: Tensor, seconds: float) -> dict[str, float]:
    """Least seconds per layer of each format."""
    best, end = dict.fromkeys(layers, float("inf")), time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, products in layers.items():
            start = time.perf_counter()
            for product in products:
                product(x)
            best[name] = min(best[name], (time.perf_counter() - start) / len(products))
    return best


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=6.0, help="per number of tokens")
    arguments = parser.parse_args()
    dtype, threads = getattr(torch, arguments.dtype), arguments.threads or machine.usable_cores()
    ops = OpTable.resolve(CpuPlatform(PlatformConfig(num_threads=threads)).ops(dtype), "cpu")
    weights = [torch.randn(arguments.outputs, arguments.inputs).to(dtype) for _ in range(LAYERS)]
    layers = {name: [make(ops, weight) for weight in weights] for name, make in FORMATS.items()}
    print(", ".join(f"{key}: {value}" for key, value in CpuPlatform.probe().facts.items()))
    print(f"{threads} threads, {arguments.inputs} inputs, {arguments.outputs} outputs, plain is {arguments.dtype}")
    print(f"{'tokens':>6}{'plain µs':>10}" + "".join(f"{name:>12}" for name in layers if name != "plain"))
    for tokens in TOKENS:
        best = times(layers, torch.randn(tokens, arguments.inputs).to(dtype), arguments.seconds)
        ratios = "".join(f"{best['plain'] / best[name]:>11.2f}×" for name in layers if name != "plain")
        print(f"{tokens:>6}{best['plain'] * 1e6:>10.0f}{ratios}", flush=True)


if __name__ == "__main__":
    main()
