"""Native operations against the reference in float64, and against themselves in other batches and thread counts."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.ops import reference
from dovetail.ops.sampling import SamplingTensors
from dovetail.platforms.cpu.kernels import Kernels
from dovetail.platforms.cpu.ops import CpuOps

SIZES = [1, 7, 16, 48, 100, 768]
ROWS = [1, 2, 5, 6, 7, 13, 96, 97, 200]


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
def test_rms_norm(ops: OpTable, dtype: torch.dtype, size: int) -> None:
    x, weight = randn(37, 3, size, dtype=dtype) * 3, randn(size, dtype=dtype, seed=1)
    check(ops.rms_norm(x, weight, 1e-3), reference.rms_norm(x.double(), weight.double(), 1e-3))
    columns = x[:, 1]
    check(ops.rms_norm(columns, weight, 1e-3), reference.rms_norm(columns.double(), weight.double(), 1e-3))


@pytest.mark.parametrize("size", SIZES)
def test_add_rms_norm(ops: OpTable, dtype: torch.dtype, size: int) -> None:
    x, residual, weight = (randn(9, size, dtype=dtype, seed=seed) for seed in range(3))
    before = x.clone(), residual.clone()
    normed, total = ops.add_rms_norm(x, residual, weight[0], 1e-5)
    assert torch.equal(total, x + residual)
    check(normed, reference.rms_norm(total.double(), weight[0].double(), 1e-5))
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize("size", SIZES)
def test_norm_weights_may_be_wider_than_rows(ops: OpTable, dtype: torch.dtype, size: int) -> None:
    x, residual = randn(9, size, dtype=dtype), randn(9, size, dtype=dtype, seed=1)
    weight = 1 + randn(size, dtype=torch.float32, seed=2) * 1e-3  # rounds to 1 in bf16
    check(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight.double(), 1e-5))
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(normed, ops.rms_norm(total, weight, 1e-5))
    large = torch.full((1, size), 1e3, dtype=dtype)
    assert torch.equal(ops.rms_norm(large, weight, 0.0), reference.rms_norm(large, weight, 0.0))


@pytest.mark.parametrize(("head_size", "rotary_dim"), [(64, 64), (64, 16), (40, 24), (20, 20), (256, 256)])
def test_rotary_in_place_on_views(ops: OpTable, dtype: torch.dtype, head_size: int, rotary_dim: int) -> None:
    qkv = randn(11, 6 + 2 * 2, head_size, dtype=dtype)
    q, k, v = qkv.split_with_sizes([6, 2, 2], 1)
    v_before = v.clone()
    positions = torch.randint(0, 50, (11,))
    angles = torch.randn(50, rotary_dim // 2)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    expected = reference.rotary(q.double(), k.double(), positions, cos_sin)
    rotated = ops.rotary(q, k, positions, cos_sin)
    check(rotated[0], expected[0])
    check(rotated[1], expected[1])
    assert rotated[0].data_ptr() == q.data_ptr()
    assert torch.equal(v, v_before)


def test_rotary_copies_heads_that_are_apart(ops: OpTable, dtype: torch.dtype) -> None:
    q, k = randn(5, 32, 4, dtype=dtype).transpose(1, 2), randn(5, 2, 32, dtype=dtype)
    positions, cos_sin = torch.arange(5), torch.rand(5, 32)
    expected = reference.rotary(q.double(), k.double(), positions, cos_sin)
    check(ops.rotary(q, k, positions, cos_sin)[0], expected[0])


@pytest.mark.parametrize("size", SIZES)
def test_silu_and_mul(ops: OpTable, dtype: torch.dtype, size: int) -> None:
    x = randn(300, 2 * size, dtype=dtype) * 10
    check(ops.silu_and_mul(x), reference.silu_and_mul(x.double()))


def test_silu_of_extreme_gates(ops: OpTable, dtype: torch.dtype) -> None:
    gates = torch.tensor([-1e30, -200.0, -90.0, -0.0, 90.0, 200.0, 1e30], dtype=dtype)
    out = ops.silu_and_mul(torch.cat([gates, torch.ones_like(gates)]).unsqueeze(0))
    check(out, torch.tensor([[0, 0, 0, 0, 90.0, 200.0, 1e30]], dtype=dtype))
    poisoned = ops.silu_and_mul(torch.tensor([[float("nan"), float("inf"), 1, 1]], dtype=dtype))
    assert poisoned[0, 0].isnan()
    assert poisoned[0, 1] == float("inf")


@pytest.mark.parametrize("size", SIZES)
def test_gelu_tanh_and_mul(ops: OpTable, dtype: torch.dtype, size: int) -> None:
    x = randn(300, 2 * size, dtype=dtype) * 4
    check(ops.gelu_tanh_and_mul(x), reference.gelu_tanh_and_mul(x.double()))


def test_gelu_of_extreme_gates(ops: OpTable, dtype: torch.dtype) -> None:
    gates = torch.tensor([-1e30, -200.0, -10.0, -0.0, 10.0, 200.0, 1e30], dtype=dtype)
    out = ops.gelu_tanh_and_mul(torch.cat([gates, torch.ones_like(gates)]).unsqueeze(0))
    check(out, torch.tensor([[0, 0, 0, 0, 10.0, 200.0, 1e30]], dtype=dtype))
    assert ops.gelu_tanh_and_mul(torch.tensor([[float("nan"), 1]], dtype=dtype)).isnan()


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("inputs", "outputs"), [(2, 1), (48, 63), (96, 130), (768, 64), (130, 257)])
def test_linear(ops: OpTable, dtype: torch.dtype, inputs: int, outputs: int, bias: bool) -> None:
    weight = randn(outputs, inputs, dtype=dtype) / inputs**0.5
    bias_O = randn(outputs, dtype=dtype, seed=1) if bias else None
    packed = ops.linear_pack(weight)
    for rows in ROWS:
        x = randn(rows, inputs, dtype=dtype, seed=rows)
        expected = x.double() @ weight.double().t()
        check(ops.linear(x, packed, bias_O), expected if bias_O is None else expected + bias_O.double())


def test_linear_takes_slices(ops: OpTable, dtype: torch.dtype) -> None:
    packed = ops.linear_pack(randn(30, 32, dtype=dtype))
    x = randn(20, 100, dtype=dtype)
    assert torch.equal(ops.linear(x[3:9, 8:40], packed), ops.linear(x[3:9, 8:40].contiguous(), packed))
    transposed = randn(32, 5, dtype=dtype).t()
    assert torch.equal(ops.linear(transposed, packed), ops.linear(transposed.contiguous(), packed))
    assert ops.linear(x[:0, :32], packed).shape == (0, 30)


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


def test_embedding_reads_plain_and_packed_tables_alike(ops: OpTable, dtype: torch.dtype) -> None:
    table, ids = randn(150, 96, dtype=dtype), torch.tensor([0, 149, 63, 64, 64, 5, 6, 7, 8])
    assert torch.equal(ops.embedding(ids, table), table[ids])
    assert torch.equal(ops.embedding(ids, ops.linear_pack(table)), table[ids])
    for wrong in (-1, 150):
        with pytest.raises(IndexError, match=r"outside 0 \.\. 149"):
            ops.embedding(torch.tensor([0, wrong]), ops.linear_pack(table))


def greedy(rows: int, all_greedy: bool = True) -> SamplingTensors:
    zeros = torch.zeros(rows)
    return SamplingTensors(
        temperature_S=zeros,
        top_k_S=zeros.long(),
        top_p_S=zeros + 1,
        min_p_S=zeros,
        seeds_S=zeros.long(),
        positions_S=zeros.long(),
        all_greedy=all_greedy,
        any_filter=False,
    )


@pytest.mark.parametrize("size", [1, 100, 1024, 1030, 5000])
def test_greedy_sample_takes_the_first_of_the_largest(ops: OpTable, dtype: torch.dtype, size: int) -> None:
    logits = randn(40, size + 3, dtype=dtype)[:, :size]
    logits[:, size // 2 :] = logits[:, size // 2 :].round()  # ties
    best = logits == logits.amax(-1, keepdim=True)
    expected = torch.where(best, torch.arange(size), size).amin(-1)
    assert torch.equal(ops.sample(logits, greedy(40)), expected)
    assert torch.equal(ops.sample(logits, greedy(40, all_greedy=False)), reference.sample(logits, greedy(40)))


def test_greedy_sample_with_infinities_and_nan(ops: OpTable, dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.zeros(6, 3000, dtype=dtype)
    logits[0] = -inf
    logits[1] = -inf
    logits[1, 2500] = -5
    logits[2, 1500] = inf
    logits[3, 1500] = inf
    logits[3, 2000] = nan
    logits[4, 2990] = nan
    logits[5, :2999] = -inf
    assert ops.sample(logits, greedy(6)).tolist() == [0, 2500, 1500, 2000, 2990, 2999]


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
