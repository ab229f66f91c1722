"""Native experts against the reference in float64, and against themselves in other batches and thread counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.ops import reference
from dovetail.platforms.cpu.expert_ops import ExpertOps, PackedExperts
from dovetail.platforms.cpu.kernels import Kernels

SHAPES = [(1, 1, 16, 24), (4, 2, 64, 96), (7, 3, 130, 50), (16, 8, 48, 64)]
"""Experts, experts per token, hidden and inner size."""


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(experts: int, hidden: int, inner: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    gate_up = randn(experts, 2 * inner, hidden, dtype=dtype) / hidden**0.5
    return gate_up, randn(experts, hidden, inner, dtype=dtype, seed=1) / inner**0.5


def routes(tokens: int, experts: int, active: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Different experts for each token, with weights that sum to 1; the last expert is taken by few."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    scores[:, -1] *= 0.1
    return scores.topk(active).indices, torch.rand(tokens, active, generator=generator).softmax(-1)


def exact(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, factors: Tensor) -> Tensor:
    return reference.moe_experts(x.double(), gate_up.double(), down.double(), ids, factors.double())


def check(actual: Tensor, expected: Tensor) -> None:
    """Two roundings to storage on the way, and one at the end."""
    tolerance = {torch.float32: 5e-6, torch.bfloat16: 1e-2}[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("experts", "active", "hidden", "inner"), SHAPES)
def test_experts(native: Kernels, dtype: torch.dtype, experts: int, active: int, hidden: int, inner: int) -> None:
    native.set_threads(2)
    ops = OpTable.resolve(ExpertOps(native).table(), "cpu")
    gate_up, down = weights(experts, hidden, inner, dtype)
    packed = ops.experts_pack(gate_up), ops.experts_pack(down)
    assert all(isinstance(part, PackedExperts) for part in packed)
    for tokens in (1, 2, 7, 100, 300):
        x = randn(tokens, hidden, dtype=dtype, seed=tokens)
        ids, factors = routes(tokens, experts, active, seed=tokens)
        out = ops.moe_experts(x, *packed, ids, factors)
        assert out.dtype is dtype
        check(out, exact(x, gate_up, down, ids, factors))
    assert ops.moe_experts(x[:0], *packed, ids[:0], factors[:0]).shape == (0, hidden)


def test_experts_that_do_not_exist_add_nothing(native: Kernels, dtype: torch.dtype) -> None:
    ops = ExpertOps(native)
    gate_up, down = weights(3, 32, 16, dtype)
    packed = ops.experts_pack(gate_up), ops.experts_pack(down)
    x, ids = randn(4, 32, dtype=dtype), torch.tensor([[0, -1], [3, 2], [-5, 9], [1, 1]])
    factors = torch.rand(4, 2)
    out = ops.moe_experts(x, *packed, ids, factors)
    check(out, exact(x, gate_up, down, ids, factors))
    assert out[2].count_nonzero() == 0


def test_inputs_need_not_be_contiguous(native: Kernels, dtype: torch.dtype) -> None:
    ops = ExpertOps(native)
    packed = [ops.experts_pack(part) for part in weights(4, 32, 16, dtype)]
    x, (ids, factors) = randn(32, 9, dtype=dtype).t(), routes(9, 4, 2)
    out = ops.moe_experts(x, *packed, ids.t().contiguous().t(), factors.double().t().contiguous().t())
    assert torch.equal(out, ops.moe_experts(x.contiguous(), *packed, ids, factors))
    assert torch.equal(out, ops.moe_experts(x, *packed, ids.to(torch.int32), factors))


def test_a_token_gets_the_same_bits_whoever_shares_its_experts(native: Kernels, dtype: torch.dtype) -> None:
    ops = ExpertOps(native)
    packed = [ops.experts_pack(part) for part in weights(5, 64, 96, dtype)]
    x, (ids, factors) = randn(400, 64, dtype=dtype), routes(400, 5, 2)
    native.set_threads(1)
    whole = ops.moe_experts(x, *packed, ids, factors)
    for threads, rows in ((1, 1), (2, 1), (2, 2), (3, 5), (2, 7), (2, 64), (3, 211)):
        native.set_threads(threads)
        for start in range(0, min(400 - rows, 40 * rows), rows):
            part = slice(start, start + rows)
            assert torch.equal(ops.moe_experts(x[part], *packed, ids[part], factors[part]), whole[part])
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ops.moe_experts(x[order], *packed, ids[order], factors[order]), whole[order])


@pytest.mark.parametrize(("hidden", "inner"), [(31, 16), (32, 15)])
def test_odd_sizes_in_half_precision_run_on_the_reference(native: Kernels, hidden: int, inner: int) -> None:
    ops = ExpertOps(native)
    gate_up, down = weights(3, hidden, inner, torch.bfloat16)
    x, (ids, factors) = randn(6, hidden, dtype=torch.bfloat16), routes(6, 3, 2)
    out = ops.moe_experts(x, ops.experts_pack(gate_up), ops.experts_pack(down), ids, factors)
    assert torch.equal(out, reference.moe_experts(x, gate_up, down, ids, factors))


def test_other_dtypes_run_on_the_reference(native: Kernels) -> None:
    ops = ExpertOps(native)
    gate_up, down = weights(3, 8, 4, torch.float64)
    assert ops.experts_pack(gate_up) is gate_up
    x, (ids, factors) = randn(6, 8, dtype=torch.float64), routes(6, 3, 2)
    out = ops.moe_experts(x, gate_up, down, ids, factors)
    assert torch.equal(out, reference.moe_experts(x, gate_up, down, ids, factors))
