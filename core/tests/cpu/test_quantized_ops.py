"""Native operations on 8-bit numbers against the reference in float64, and against themselves in other batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.ops import reference
from dovetail.platforms.cpu.kernels import Kernels
from dovetail.platforms.cpu.ops import CpuOps

FP8 = torch.float8_e4m3fn
CODES = pytest.mark.parametrize("code", [torch.int8, FP8], ids=["int8", "fp8"])
SIZES = pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (7, 63), (96, 130), (600, 64), (1030, 65)])
GROUPS = pytest.mark.parametrize("group", [None, 128, 5])
ROWS = [1, 2, 5, 6, 7, 13, 96, 97]


@pytest.fixture
def ops(native: Kernels, dtype: torch.dtype) -> OpTable:
    native.set_threads(2)
    return OpTable.resolve(CpuOps(native, dtype).table(), "cpu")


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantized(
    rows: int, inputs: int, code: torch.dtype, group: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Random codes of the whole range, and scales that bring sums near 1."""
    groups = -(-inputs // (group or inputs))
    values = randn(rows, inputs, seed=seed) * (40 if code == torch.int8 else 100)
    return values.clamp(-127, 127).to(code), (randn(rows, groups, seed=seed + 1).abs() + 0.1) / 40 / inputs**0.5


def dequantized(values: Tensor, scale: Tensor, group: int | None) -> Tensor:
    """In float64."""
    each = torch.arange(values.shape[1]) // (group or values.shape[1])
    return values.float().double() * scale.double()[:, each]


def check(actual: Tensor, expected: Tensor) -> None:
    """One rounding to storage, after sums of about a thousand terms."""
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 4e-3}[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


@CODES
@SIZES
@GROUPS
def test_weight_only_mm(
    ops: OpTable, dtype: torch.dtype, code: torch.dtype, inputs: int, outputs: int, group: int | None
) -> None:
    weight, scale = quantized(outputs, inputs, code, group)
    bias = randn(outputs, dtype=dtype, seed=9)
    packed = ops.weight_only_pack(weight, scale, group)
    for rows in ROWS:
        x = randn(rows, inputs, dtype=dtype, seed=rows)
        expected = x.double() @ dequantized(weight, scale, group).t()
        check(ops.weight_only_mm(x, packed), expected)
        check(ops.weight_only_mm(x, packed, bias), expected + bias.double())


@CODES
@SIZES
def test_block_scaled_mm(ops: OpTable, dtype: torch.dtype, code: torch.dtype, inputs: int, outputs: int) -> None:
    weight, scale = quantized(outputs, inputs, code, 128)
    packed = ops.block_scaled_pack(weight, scale, 128)
    for rows in ROWS:
        x, x_scale = quantized(rows, inputs, code, 128, seed=rows)
        x_scale = x_scale * inputs**0.5
        expected = dequantized(x, x_scale, 128) @ dequantized(weight, scale, 128).t()
        check(ops.block_scaled_mm(x, packed, x_scale, dtype), expected)


@CODES
@SIZES
@pytest.mark.parametrize("per_tensor", [False, True])
def test_scaled_mm(
    ops: OpTable, dtype: torch.dtype, code: torch.dtype, inputs: int, outputs: int, per_tensor: bool
) -> None:
    weight, scale = quantized(outputs, inputs, code)
    packed = ops.scaled_mm_pack(weight)
    for rows in ROWS:
        x, x_scale = quantized(rows, inputs, code, seed=rows)
        x_scale = x_scale * inputs**0.5
        if per_tensor:
            scale, x_scale = scale[:1], x_scale[:1]
        expected = (
            dequantized(x, x_scale.expand(rows, 1), None) @ dequantized(weight, scale.expand(outputs, 1), None).t()
        )
        check(ops.scaled_mm(x, packed, x_scale, scale, dtype), expected)
        assert torch.equal(
            ops.scaled_mm(x, weight, x_scale, scale, dtype), reference.scaled_mm(x, weight, x_scale, scale, dtype)
        )


def test_int8_sums_are_exact(ops: OpTable) -> None:
    """Even where float32 could not hold them."""
    inputs = 20_000
    x = torch.full((7, inputs), 127, dtype=torch.int8)
    x[1], x[2, ::2] = -127, -128
    x[3] = torch.arange(inputs) % 255 - 127
    weight = torch.full((3, inputs), 127, dtype=torch.int8)
    weight[1], weight[2] = -128, torch.arange(inputs) % 251 - 125
    expected = x.to(torch.int64) @ weight.to(torch.int64).t()
    one = torch.ones(1, 1)
    assert torch.equal(ops.scaled_mm(x, ops.scaled_mm_pack(weight), one, one, torch.float32), expected.float())


def test_every_fp8_code(ops: OpTable) -> None:
    """Decoded exactly, subnormals too; encoded as torch encodes."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127].view(FP8)
    one = torch.ones(len(codes), 1)
    column = codes.unsqueeze(1)
    for rows in (1, 7):
        x = torch.full((rows, 1), 1.0)
        assert torch.equal(ops.weight_only_mm(x, ops.weight_only_pack(column, one)), codes.float().expand(rows, -1))
    between = torch.linspace(-1, 1, 40_001) ** 5 * 448
    row = torch.cat([codes.float(), between, torch.tensor([448.0])]).unsqueeze(0)
    values, scale = ops.quantize_rows(row, FP8)
    assert scale.tolist() == [[1.0]]
    assert torch.equal(values.view(torch.uint8), row.to(FP8).view(torch.uint8))


@CODES
@pytest.mark.parametrize("inputs", [1, 15, 16, 100, 768])
@GROUPS
def test_quantize_rows(ops: OpTable, dtype: torch.dtype, code: torch.dtype, inputs: int, group: int | None) -> None:
    """Bit for bit."""
    x = randn(50, inputs + 3, dtype=dtype)[:, :inputs] * torch.logspace(-6, 6, 50).to(dtype).unsqueeze(1)
    x[3], x[4] = 0, x[5].abs()
    x[6] = (torch.arange(inputs) - inputs // 2) * 0.5  # ties
    for actual, expected in zip(
        ops.quantize_rows(x, code, group), reference.quantize_rows(x, code, group), strict=True
    ):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual.float(), expected.float())


@CODES
def test_quantize_rows_that_are_not_finite(ops: OpTable, dtype: torch.dtype, code: torch.dtype) -> None:
    x = randn(4, 40, dtype=dtype)
    x[1, 39], x[2, 3], x[3, 0] = torch.nan, torch.inf, -torch.inf
    values, scale = ops.quantize_rows(x, code)
    assert scale.isfinite().flatten().tolist() == [True, False, False, False]
    product = ops.scaled_mm(values, ops.scaled_mm_pack(values), scale, scale[:1].expand(4, 1), torch.float32)
    assert product.isfinite().all(1).tolist() == [True, False, False, False]


def test_weights_with_nan_run_on_the_reference(ops: OpTable, dtype: torch.dtype) -> None:
    weight = randn(5, 8).to(FP8)
    weight[2, 3] = torch.nan
    scale, x = torch.ones(5, 1), randn(3, 8, dtype=dtype)
    bad = torch.arange(5) == 2
    codes, x_scale = reference.quantize_rows(x, FP8)
    for result in (
        ops.weight_only_mm(x, ops.weight_only_pack(weight, scale)),
        ops.scaled_mm(codes, ops.scaled_mm_pack(weight), x_scale, scale, dtype),
        ops.block_scaled_mm(codes, ops.block_scaled_pack(weight, scale, 8), x_scale, dtype),
    ):
        assert torch.equal(result.isnan(), bad.expand(3, 5))


@CODES
@pytest.mark.parametrize("inputs", [130, 1100])
def test_every_row_gets_the_same_bits_in_any_batch(
    native: Kernels, dtype: torch.dtype, code: torch.dtype, inputs: int
) -> None:
    ops = OpTable.resolve(CpuOps(native, dtype).table(), "cpu")
    x, (weight, scale) = randn(210, inputs, dtype=dtype), quantized(200, inputs, code)
    block_scale = quantized(200, inputs, code, 128)[1]
    packed = (
        ops.weight_only_pack(weight, scale),
        ops.weight_only_pack(weight, block_scale, 128),
        ops.scaled_mm_pack(weight),
        ops.block_scaled_pack(weight, block_scale, 128),
    )

    def run(rows: Tensor) -> list[Tensor]:
        per_row, per_block = ops.quantize_rows(rows, code), ops.quantize_rows(rows, code, 128)
        return [
            ops.weight_only_mm(rows, packed[0]),
            ops.weight_only_mm(rows, packed[1]),
            ops.scaled_mm(per_row[0], packed[2], per_row[1], scale, dtype),
            ops.block_scaled_mm(per_block[0], packed[3], per_block[1], dtype),
        ]

    native.set_threads(1)
    whole = run(x)
    for threads, rows in ((1, 1), (2, 1), (2, 2), (3, 5), (2, 7), (2, 64), (3, 97)):
        native.set_threads(threads)
        for start in range(0, min(210 - rows, 12 * rows), rows):
            for part, full in zip(run(x[start : start + rows]), whole, strict=True):
                assert torch.equal(part, full[start : start + rows])


def test_other_dtypes_and_strides(ops: OpTable, dtype: torch.dtype) -> None:
    weight, scale = quantized(30, 32, torch.int8)
    x = randn(20, 100, dtype=dtype)
    packed = ops.weight_only_pack(weight, scale)
    part = x[3:9, 8:40]
    assert torch.equal(ops.weight_only_mm(part, packed), ops.weight_only_mm(part.contiguous(), packed))
    assert torch.equal(ops.quantize_rows(part, FP8)[0].float(), ops.quantize_rows(part.contiguous(), FP8)[0].float())
    half = randn(3, 32, dtype=torch.float16)
    bias = randn(60, dtype=torch.float16)[::2]
    product = ops.weight_only_mm(half, packed, bias)
    torch.testing.assert_close(product, reference.weight_only_mm(half, reference.weight_only_pack(weight, scale), bias))
    codes, x_scale = ops.quantize_rows(half, torch.int8)
    product = ops.scaled_mm(codes, ops.scaled_mm_pack(weight), x_scale, scale, torch.float16)
    torch.testing.assert_close(product, reference.scaled_mm(codes, weight, x_scale, scale, torch.float16))
    assert ops.weight_only_mm(x[:0, :32], packed).shape == (0, 30)
    assert ops.quantize_rows(x[:0], FP8)[0].shape == (0, 100)
