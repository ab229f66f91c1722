"""Products with weights of 8 and 4 bits, and the quantization of activations, against the reference in float64."""

import pytest
import torch
from inputs import DEVICE, DTYPES, INTERPRETED, close, randn

from dovetail.ops import reference
from dovetail_cuda import quantized
from dovetail_cuda.kernels import activation, norm
from dovetail_cuda.kernels.narrow import Codes, Tiling, product, tile, wide
from dovetail_cuda.kernels.prompt_support import has_engine
from dovetail_cuda.kernels.quantize import quantize_rows

FP8 = torch.float8_e4m3fn
# the interpreter's float8 is not the chip's
NARROW = [torch.int8] if INTERPRETED else [torch.int8, FP8]
SHAPES = [(1, 64, 40, None), (9, 200, 37, None), (17, 160, 70, 32), (70, 96, 130, 96), (3, 600, 20, 128)]
"""Tokens, inputs, outputs and group."""


def codes(outputs, inputs, dtype, seed=1):
    if dtype == torch.int8:
        numbers = torch.randint(-127, 128, (outputs, inputs), generator=torch.Generator().manual_seed(seed))
        return numbers.to(dtype).to(DEVICE)
    return (100 * randn(outputs, inputs, seed=seed)).clamp(-448, 448).to(dtype)


def scales(*shape, seed=2):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.1).to(DEVICE) / 100


def groups(inputs, group):
    return -(-inputs // (group or inputs))


def dequantized(values, scale, group):
    return values.double() * scale.double().repeat_interleave(group or values.shape[1], 1)[:, : values.shape[1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("narrow", NARROW, ids=str)
@pytest.mark.parametrize(("tokens", "inputs", "outputs", "group"), SHAPES)
def test_weight_only(dtype, narrow, tokens, inputs, outputs, group):
    weight, scale = codes(outputs, inputs, narrow), scales(outputs, groups(inputs, group))
    x, bias = randn(tokens, inputs + 4, dtype=dtype)[:, 4:], randn(outputs, dtype=dtype, seed=3)
    packed, exact = quantized.weight_only_pack(weight, scale, group), dequantized(weight, scale, group)
    assert isinstance(packed, Codes)
    close(quantized.weight_only_mm(x, packed), x.double() @ exact.t(), dtype)
    close(quantized.weight_only_mm(x, packed, bias), x.double() @ exact.t() + bias.double(), dtype)
    close(wide(packed, dtype), exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("narrow", NARROW, ids=str)
@pytest.mark.parametrize(("splits", "size"), [(1, (16, 32)), (3, (16, 32)), (2, (64, 64))])
@pytest.mark.parametrize("group", [None, 64])
def test_tilings(dtype, narrow, splits, size, group):
    weight, scale = codes(40, 320, narrow), scales(40, groups(320, group))
    tiling = Tiling(tokens=size[0], outputs=size[1], inputs=32, splits=splits, warps=4, stages=2)
    x, packed = randn(20, 320, dtype=dtype), quantized.weight_only_pack(weight, scale, group)
    expected = x.double() @ dequantized(weight, scale, group).t()
    for _ in range(2):  # the first leaves its locks as it found them
        close(product(x, packed, None, None, dtype, tiling=tiling), expected, dtype)


@pytest.mark.skipif(INTERPRETED, reason="computes in order")
@pytest.mark.parametrize("narrow", NARROW, ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 32, 64, 200, 512])
def test_repeats(narrow, tokens):
    weight, scale, x = codes(4096, 2048, narrow), scales(4096, 1), randn(tokens, 2048, dtype=torch.bfloat16)
    packed, (values, x_scale) = quantized.weight_only_pack(weight, scale), quantize_rows(x, narrow)

    def run():
        return quantized.weight_only_mm(x, packed), product(values, packed, x_scale, None, x.dtype)

    first = run()
    close(first[0], x.double() @ dequantized(weight, scale, None).t(), x.dtype)
    for _ in range(50):
        for out, before in zip(run(), first, strict=True):
            assert torch.equal(out, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "group"), [(9, 200, 37, 200), (17, 160, 70, 32), (3, 640, 20, 128), (5, 64, 12, 4)]
)
def test_pairs(dtype, zeros, tokens, inputs, outputs, group):
    packed = codes(outputs, inputs // 2, torch.int8).view(torch.uint8)
    shape = (groups(inputs, group), outputs)  # any strides
    scale, zero = scales(*shape).to(dtype).t(), None
    if zeros:
        zero = torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(4)).to(dtype).to(DEVICE).t()
    x = randn(tokens, inputs, dtype=dtype)
    expected = reference.w4a16_mm(x.double(), packed, scale.double(), None if zero is None else zero.double(), group)
    close(quantized.w4a16_mm(x, packed, scale, zero, group), expected, dtype)
    if group % 32 == 0 or group == inputs:
        eye = torch.eye(inputs, dtype=torch.float64, device=DEVICE)
        exact = reference.w4a16_mm(eye, packed, scale.double(), None if zero is None else zero.double(), group)
        close(wide(Codes(packed, scale, zero, group), dtype), exact.t(), dtype)


@pytest.mark.skipif(not has_engine(DEVICE), reason="lacks the copy engine")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "fp8", "pairs", "pairs with zeros"])
@pytest.mark.parametrize("rows", [128, 256])
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "group"),
    [(3, 32, 16, None), (300, 1120, 200, 192), (257, 640, 129, None)],
)
def test_many_rows(dtype, kind, rows, tokens, inputs, outputs, group):
    from dovetail_cuda.kernels.many_rows import many_rows_product

    pairs, size, zero = kind.startswith("pairs"), groups(inputs, group), None
    if pairs:
        weight = codes(outputs, inputs // 2, torch.int8).view(torch.uint8)
        numbers = torch.stack([weight & 15, weight >> 4], dim=-1).flatten(1).double() - 8
    else:
        weight = codes(outputs, inputs, torch.int8 if kind == "int8" else FP8)
        numbers = weight.double()
    scale = scales(size, outputs).t()
    if kind == "pairs with zeros":
        zero = (15 * torch.rand(outputs, size, generator=torch.Generator().manual_seed(4))).round().to(DEVICE)
        numbers += 8 - zero.double().repeat_interleave(group or inputs, 1)[:, :inputs]
    x, bias = randn(tokens, inputs + 8, dtype=dtype)[:, 8:], randn(outputs, dtype=dtype, seed=3)
    packed = Codes(weight, scale, zero, group or inputs)
    expected = x.double() @ dequantized(numbers, scale, group).t()
    out = many_rows_product(x, packed, bias, 2, rows)  # programs that have several tiles
    close(out, expected + bias.double(), dtype)
    for _ in range(20):
        assert torch.equal(many_rows_product(x, packed, bias, 132, rows), out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("narrow", NARROW, ids=str)
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "group"), [*SHAPES, (132, 256, 256, None), (132, 256, 256, 128)]
)
def test_scaled(dtype, narrow, tokens, inputs, outputs, group):
    weight, scale = codes(outputs, inputs, narrow), scales(outputs, groups(inputs, group))
    x, x_scale = codes(tokens, inputs, narrow, seed=5), scales(tokens, groups(inputs, group), seed=6)
    expected = dequantized(x, x_scale, group) @ dequantized(weight, scale, group).t()
    if group is None:
        out = quantized.scaled_mm(x, quantized.scaled_mm_pack(weight), x_scale, scale, dtype)
        whole = quantized.scaled_mm(x, weight, x_scale[:1], scale[:1], dtype)
        close(whole, (x.double() * x_scale[:1].double()) @ (weight.double() * scale[:1].double()).t(), dtype)
    else:
        out = quantized.block_scaled_mm(x, quantized.block_scaled_pack(weight, scale, group), x_scale, dtype)
    close(out, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("narrow", [*NARROW, torch.uint8], ids=str)
@pytest.mark.parametrize("counts", [(0, 0, 0), (0, 1, 0), (9, 0, 20), (70, 80, 90)], ids=str)
def test_experts(dtype, narrow, counts):
    inputs, outputs, group = 128, 40, 64
    pairs = narrow == torch.uint8
    weight = codes(3 * outputs, 64, torch.int8).view(narrow) if pairs else codes(3 * outputs, inputs, narrow)
    weight, scale = weight.view(3, outputs, -1), scales(3, outputs, 2)
    zero = (10 * scales(3, outputs, 2, seed=3)).round() if pairs else None
    plain = reference.quantized_experts_pack(weight, scale.double(), zero, group)
    packed = quantized.quantized_experts_pack(weight, scale, zero, group)
    starts = torch.tensor([0, *counts], device=DEVICE).cumsum(0)
    x = randn(sum(counts), inputs, dtype=dtype)
    expected = reference.quantized_experts_mm(x.double(), plain, starts)
    if sum(counts):
        close(quantized.quantized_experts_mm(x, packed, starts), expected, dtype)
    if sum(counts) and not pairs:
        x, x_scale = codes(len(x), inputs, narrow), scales(len(x), 2, seed=6)
        expected = reference.quantized_experts_mm(dequantized(x, x_scale, group), plain, starts)
        close(quantized.quantized_experts_mm(x, packed, starts, x_scale, dtype), expected, dtype)


def test_integer_sums_are_exact():
    weight = torch.full((20, 4096), 127, dtype=torch.int8, device=DEVICE)
    one = torch.ones(1, 1, device=DEVICE)
    out = quantized.scaled_mm(weight[:3], weight, one, one, torch.float32)
    assert torch.equal(out, torch.full_like(out, 127 * 127 * 4096))


@pytest.mark.skipif(INTERPRETED, reason="lacks fp8")
@pytest.mark.parametrize("tokens", [70, 128])
def test_square_blocks(tokens):
    weight, block = codes(384, 512, FP8), scales(3, 4)
    scale = block.repeat_interleave(128, 0)
    packed = quantized.block_scaled_pack(weight, scale, 128)
    assert (packed.block_scale_GB is not None) == (torch.cuda.get_device_capability() == (9, 0))
    x, x_scale = quantize_rows(randn(tokens, 512, dtype=torch.bfloat16), FP8, 128)
    expected = dequantized(x, x_scale, 128) @ dequantized(weight, scale, 128).t()
    close(quantized.block_scaled_mm(x, packed, x_scale, torch.bfloat16), expected, torch.bfloat16)
    uneven = scale.clone()
    uneven[5] *= 2
    assert quantized.block_scaled_pack(weight, uneven, 128).block_scale_GB is None


@pytest.mark.skipif(INTERPRETED, reason="widens in another way")
@pytest.mark.parametrize("narrow", NARROW, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code(dtype, narrow):
    every = torch.arange(256, device=DEVICE).to(torch.uint8).view(narrow).unsqueeze(0)
    every = torch.where(every.float().isnan(), 0.0, every.float()).to(narrow)
    packed = quantized.weight_only_pack(every.expand(40, -1), torch.ones(40, 1, device=DEVICE))
    product_of_eye = quantized.weight_only_mm(torch.eye(256, dtype=dtype, device=DEVICE), packed)
    for weight in (wide(packed, dtype), product_of_eye.t()):
        assert torch.equal(weight.float(), every.float().expand(40, -1))


@pytest.mark.skipif(INTERPRETED, reason="lacks fp8")
def test_nan_stays_nan():
    weight = codes(40, 64, FP8)
    weight.view(torch.uint8)[3, 5] = 0x7F
    out = quantized.weight_only_mm(randn(2, 64), quantized.weight_only_pack(weight, scales(40, 1)))
    assert bool(out[:, 3].isnan().all())
    assert bool(out[:, :3].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("narrow", NARROW, ids=str)
@pytest.mark.parametrize(("tokens", "inputs", "group"), [(0, 8, None), (1, 7, None), (5, 100, 24), (3, 3000, 128)])
def test_quantize_rows(dtype, narrow, tokens, inputs, group):
    x = (randn(tokens, inputs + 1) * 10 ** randn(tokens, 1, seed=1)).to(dtype)[:, 1:]
    exact = reference.quantize_rows(x.cpu(), narrow, group)  # which divides, where a chip's own multiplies
    for actual, expected in zip(quantize_rows(x, narrow, group), exact, strict=True):
        assert torch.equal(actual.cpu().float(), expected.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("narrow", NARROW, ids=str)
@pytest.mark.parametrize(
    ("tokens", "width", "group"),
    [(0, 8, None), (1, 7, None), (2, 1100, None), (5, 100, 24), (5, 100, 32), (3, 3000, 128), (3, 96, 256)],
)
def test_quantized_as_it_is_computed(dtype, narrow, tokens, width, group):
    """What the two operations give one after the other; of a norm, whose sum may be in another order, nearly."""
    x, residual = randn(tokens, 2 * width + 6, dtype=dtype)[:, 6:], randn(tokens, width, dtype=dtype, seed=1)
    weight = randn(width, seed=2)
    normed, total = norm.add_rms_norm(x[:, :width], residual, weight, 1e-5)
    values, scale, summed = norm.add_rms_norm_quantize(x[:, :width], residual, weight, 1e-5, narrow, group)
    exact, exact_scale = quantize_rows(normed, narrow, group)
    assert (values.dtype, values.shape, scale.shape) == (narrow, exact.shape, exact_scale.shape)
    assert torch.equal(summed, total)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(scale, exact_scale, rtol=4 * eps, atol=0)
    # an element that was rounded otherwise may be a step of the 8 bits away, but hardly any is
    step = 1.01 if narrow == torch.int8 else 32.0
    torch.testing.assert_close(values.float(), exact.float(), rtol=0, atol=step)
    assert (values.float() != exact.float()).sum() <= 0.02 * values.numel()
    expected = quantize_rows(activation.silu_and_mul(x), narrow, group)
    for got, want in zip(activation.silu_and_mul_quantize(x, narrow, group), expected, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got.float(), want.float())


@pytest.mark.parametrize("narrow", NARROW, ids=str)
def test_quantize_rows_that_are_not_finite(narrow):
    x = randn(4, 96)
    x[1], x[2, 5], x[3, 9] = 0.0, -torch.inf, torch.nan
    values, scale = quantize_rows(x, narrow)
    assert torch.equal(values[0].float(), quantize_rows(x[:1], narrow)[0][0].float())
    assert not values[1].float().any()
    assert scale.isfinite().flatten().tolist() == [True, True, False, False]


@pytest.mark.parametrize(("tokens", "outputs"), [(1, 4096), (16, 4096), (64, 4096), (64, 28672), (512, 4096)])
def test_tilings_fill_the_chip(tokens, outputs):
    packed = Codes(torch.empty(outputs, 4096, dtype=torch.int8, device="meta"), torch.empty(0), None, 4096)
    tiling = tile(tokens, 0, packed, torch.bfloat16, 132)
    assert -(-outputs // tiling.outputs) * -(-tokens // tiling.tokens) * tiling.splits >= 132


@pytest.mark.skipif(INTERPRETED, reason="lacks graphs")
@pytest.mark.parametrize("narrow", NARROW, ids=str)
@pytest.mark.parametrize("tokens", [4, 160])
def test_graphs(narrow, tokens):
    weight, scale = codes(256, 1024, narrow), scales(256, 1)
    packed, per_group = quantized.weight_only_pack(weight, scale), scales(256, 8)
    blocks = quantized.block_scaled_pack(weight, per_group, 128)

    def run(x):
        rows, row_groups = quantize_rows(x, narrow), quantize_rows(x, narrow, 128)
        return (
            quantized.weight_only_mm(x, packed),
            quantized.scaled_mm(rows[0], weight, rows[1], scale, x.dtype),
            quantized.block_scaled_mm(row_groups[0], blocks, row_groups[1], x.dtype),
            quantized.w4a16_mm(x, weight[:, :512].contiguous().view(torch.uint8), per_group, None, 128),
        )

    x, other = (randn(tokens, 1024, dtype=torch.bfloat16, seed=seed) for seed in (0, 9))
    expected = run(other)
    run(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(x)
    x.copy_(other)
    graph.replay()
    for actual, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(actual, wanted)
