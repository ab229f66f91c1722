"""What native operations do beyond the conformance suite: odd dtypes, bits in other batches and thread counts."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.ops import reference
from dovetail.platforms.cpu.kernels import Kernels
from dovetail.platforms.cpu.ops import CpuOps

SIZES = [1, 7, 16, 48, 100, 768]


@pytest.fixture
def ops(native: Kernels, dtype: torch.dtype) -> OpTable:
    native.set_threads(2)
    return OpTable.resolve(CpuOps(native, dtype).table(), "cpu")


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(actual: Tensor, expected: Tensor) -> None:
    """One rounding to storage, after sums of at most some hundred terms."""
    tolerance = {torch.float32: 5e-6, torch.bfloat16: 4e-3}[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", SIZES)
def test_norm_weights_may_be_wider_than_rows(ops: OpTable, dtype: torch.dtype, size: int) -> None:
    x, residual = randn(9, size, dtype=dtype), randn(9, size, dtype=dtype, seed=1)
    weight = 1 + randn(size, dtype=torch.float32, seed=2) * 1e-3  # rounds to 1 in bf16
    check(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight.double(), 1e-5))
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(normed, ops.rms_norm(total, weight, 1e-5))
    large = torch.full((1, size), 1e3, dtype=dtype)
    assert torch.equal(ops.rms_norm(large, weight, 0.0), reference.rms_norm(large, weight, 0.0))


def test_rotary_works_in_place(ops: OpTable, dtype: torch.dtype) -> None:
    q, k, _ = randn(11, 10, 64, dtype=dtype).split_with_sizes([6, 2, 2], 1)
    rotated = ops.rotary(q, k, torch.arange(11), torch.rand(11, 64))
    assert (rotated[0].data_ptr(), rotated[1].data_ptr()) == (q.data_ptr(), k.data_ptr())


def test_rotary_copies_heads_that_are_apart(ops: OpTable, dtype: torch.dtype) -> None:
    q, k = randn(5, 32, 4, dtype=dtype).transpose(1, 2), randn(5, 2, 32, dtype=dtype)
    positions, cos_sin = torch.arange(5), torch.rand(5, 32)
    expected = reference.rotary(q.double(), k.double(), positions, cos_sin)
    check(ops.rotary(q, k, positions, cos_sin)[0], expected[0])


def test_weights_that_have_no_panels_run_on_the_reference(ops: OpTable) -> None:
    for weight in (randn(5, 7, dtype=torch.bfloat16), randn(5, 7, dtype=torch.float64)):
        x = randn(3, 7, dtype=weight.dtype)
        assert torch.equal(ops.linear(x, ops.linear_pack(weight)), reference.linear(x, weight))


def test_inputs_of_another_dtype_run_on_the_reference(ops: OpTable) -> None:
    x, weight = randn(3, 8, dtype=torch.float64), randn(8, dtype=torch.float64)
    assert torch.equal(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    assert torch.equal(ops.add_rms_norm(x, x, weight, 1e-5)[0], reference.rms_norm(2 * x, weight, 1e-5))
    assert torch.equal(ops.silu_and_mul(x), reference.silu_and_mul(x))
    assert torch.equal(ops.gelu_tanh_and_mul(x), reference.gelu_tanh_and_mul(x))
    heads, positions, cos_sin = x.view(3, 1, 8), torch.arange(3), torch.rand(3, 8)
    expected = reference.rotary(heads, heads, positions, cos_sin)
    assert torch.equal(ops.rotary(heads, heads, positions, cos_sin)[0], expected[0])


def test_embedding_refuses_what_is_no_row_of_a_packed_table(ops: OpTable, dtype: torch.dtype) -> None:
    table = randn(150, 96, dtype=dtype)
    for wrong in (-1, 150):
        with pytest.raises(IndexError, match=r"outside 0 \.\. 149"):
            ops.embedding(torch.tensor([0, wrong]), ops.linear_pack(table))


@pytest.mark.parametrize("inputs", [64, 768, 2048])
def test_every_row_gets_the_same_bits_in_any_batch(native: Kernels, dtype: torch.dtype, inputs: int) -> None:
    ops = CpuOps(native, dtype)
    packed, weight = ops.linear_pack(randn(200, inputs, dtype=dtype)), randn(inputs, dtype=dtype)
    x = randn(210, inputs, dtype=dtype)

    def run(rows: Tensor) -> list[Tensor]:
        heads = rows.clone().view(len(rows), -1, 64)
        rotated = ops.rotary(heads, heads.clone(), torch.full((len(rows),), 3), torch.ones(4, 64))
        return [
            ops.linear(rows, packed),
            ops.rms_norm(rows, weight, 1e-5),
            *ops.add_rms_norm(rows, rows, weight, 1e-5),
            ops.silu_and_mul(rows),
            ops.gelu_tanh_and_mul(rows),
            rotated[0].flatten(1),
        ]

    native.set_threads(1)
    whole = run(x)
    for threads, rows in ((1, 1), (2, 1), (2, 2), (3, 5), (2, 7), (2, 64), (3, 97)):
        native.set_threads(threads)
        for start in range(0, min(210 - rows, 40 * rows), rows):
            for part, full in zip(run(x[start : start + rows]), whole, strict=True):
                assert torch.equal(part, full[start : start + rows])


def test_many_threads_may_call_at_once(native: Kernels) -> None:
    native.set_threads(3)
    ops = CpuOps(native, torch.float32)
    packed, x = ops.linear_pack(randn(300, 64, dtype=torch.float32)), randn(50, 64, dtype=torch.float32)
    expected = ops.linear(x, packed)
    wrong: list[int] = []

    def work() -> None:
        wrong.extend(i for i in range(300) if not torch.equal(ops.linear(x, packed), expected))

    callers = [threading.Thread(target=work) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_the_number_of_threads_can_change(native: Kernels) -> None:
    ops = CpuOps(native, torch.float32)
    packed, x = ops.linear_pack(randn(300, 64, dtype=torch.float32)), randn(50, 64, dtype=torch.float32)
    expected = ops.linear(x, packed)
    for threads in (1, 4, 2, 1, 3, 0, 2):
        assert native.set_threads(threads) == max(1, threads)
        for _ in range(20):
            assert torch.equal(ops.linear(x, packed), expected)
