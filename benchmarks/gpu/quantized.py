"""Products with weights of 8 and 4 bits against those of bfloat16, which are cuBLAS's, in the same run.

    python benchmarks/gpu/quantized.py

Each cell is the time in µs of all that a linear layer does, the quantization of its activations included; in brackets,
the part of it that the weight's bytes or the operations need at the rates that this run measures first.
"""

import torch
import torch.nn.functional as F
from kernels import DEVICE, DTYPE, ceilings, copies, randn, seconds
from triton.testing import do_bench

from dovetail_cuda import quantized
from dovetail_cuda.kernels.quantize import quantize_rows

FP8 = torch.float8_e4m3fn
SHAPES = [(4096, 4096), (4096, 28672)]
"""Inputs and outputs."""
TOKENS = [1, 16, 64, 512, 1024, 2048, 8192]
GROUP = 128


def narrow(dtype, *shape):
    if dtype == FP8:
        return (60 * torch.randn(shape, device=DEVICE)).clamp(-448, 448).to(FP8)
    return torch.randint(-127, 128, shape, dtype=torch.int8, device=DEVICE).view(dtype)


def scales(*shape):
    return torch.rand(shape, device=DEVICE) / 100


def plain(x, inputs, outputs):
    weight = randn(outputs, inputs)
    return lambda: F.linear(x, weight)


def weight_only(dtype):
    def build(x, inputs, outputs):
        packed = quantized.weight_only_pack(narrow(dtype, outputs, inputs), scales(outputs, 1))
        return lambda: quantized.weight_only_mm(x, packed)

    return build


def pairs(x, inputs, outputs):
    weight, scale = narrow(torch.uint8, outputs, inputs // 2), scales(inputs // GROUP, outputs).t()
    return lambda: quantized.w4a16_mm(x, weight, scale, None, GROUP)


def both(dtype):
    def build(x, inputs, outputs):
        weight, scale = quantized.scaled_mm_pack(narrow(dtype, outputs, inputs)), scales(outputs, 1)

        def call():
            values, x_scale = quantize_rows(x, dtype)
            return quantized.scaled_mm(values, weight, x_scale, scale, DTYPE)

        return call

    return build


def blocks(x, inputs, outputs):
    scale = scales(outputs // GROUP, inputs // GROUP).repeat_interleave(GROUP, 0)
    packed = quantized.block_scaled_pack(narrow(FP8, outputs, inputs), scale, GROUP)

    def call():
        values, x_scale = quantize_rows(x, FP8, GROUP)
        return quantized.block_scaled_mm(values, packed, x_scale, DTYPE)

    return call


# bytes per weight, whether it is multiplied in 8 bits, and what makes a layer of an input
FORMATS = {
    "bf16": (2, False, plain),
    "int8": (1, False, weight_only(torch.int8)),
    "fp8": (1, False, weight_only(FP8)),
    "4 bits": (0.5 + 4 / GROUP, False, pairs),
    "int8-w8a8": (1, True, both(torch.int8)),
    "fp8-w8a8": (1, True, both(FP8)),
    "fp8 in blocks": (1, True, blocks),
}


def product_in_8_bits():
    """Operations per second of a large product."""
    a, one = narrow(FP8, 8192, 8192), torch.ones((), device=DEVICE)
    took = do_bench(
        lambda: torch._scaled_mm(a, a.t(), one, one, out_dtype=DTYPE, use_fast_accum=True), return_mode="median"
    )
    return 2 * 8192**3 / took / 1e-3


def main():
    copy, product = ceilings()
    narrow_product = product_in_8_bits()
    rates = f"copy {copy / 1e9:.0f} GB/s, product {product / 1e12:.0f} TFLOP/s, in 8 bits {narrow_product / 1e12:.0f}"
    print(f"{torch.cuda.get_device_name()}: {rates}")
    print(f"| shape | tokens | {' | '.join(FORMATS)} |\n|---|---|{'---|' * len(FORMATS)}")
    for inputs, outputs in SHAPES:
        for tokens in TOKENS:
            cells = []
            for size, in_8_bits, build in FORMATS.values():
                calls = [build(randn(tokens, inputs), inputs, outputs) for _ in copies(int(size * inputs * outputs))]
                moved = size * inputs * outputs + 2 * tokens * (inputs + outputs)
                rate = narrow_product if in_8_bits else product
                floor, took = max(moved / copy, 2 * tokens * inputs * outputs / rate), seconds(calls)
                cells.append(f"{took * 1e6:.1f} ({floor / took:.0%})")
            print(f"| {inputs} → {outputs} | {tokens} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
