"""What torchax lacks, and calls of JAX's functions inside and outside of programs."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
import torch

from dovetail_tpu import bridges


@pytest.fixture
def bridge():
    return bridges.open_bridge("jax")


def run(bridge, step, *given):
    """A step of int32 tensors as a program."""
    sizes = [tensor.numel() for tensor in given]

    def body(packed_W):
        parts = zip(torch.split(packed_W, sizes), given, strict=True)
        return [step(*(part.view(tensor.shape) for part, tensor in parts))]

    (result,) = bridge.to_host(
        bridge.call(bridge.compile(bridge.trace(body, sum(sizes))), torch.cat([tensor.flatten() for tensor in given]))
    )
    return result


X = torch.tensor([[3, 1, 2], [9, 7, 8]], dtype=torch.int32)


def in_place(x):
    x = x.float()
    for name in ("neg_", "exp_", "log1p_", "log_", "neg_", "sqrt_"):
        getattr(x, name)()
    return x


def in_place_on_a_view(x):
    x = x.float()
    x[:, 1:].exp_()
    return x


STEPS = {
    "operations in place": in_place,
    "an operation in place on a view": in_place_on_a_view,
    "bits as another type": lambda x: x.float().view(torch.int32),
    "bits as a smaller type": lambda x: x.view(torch.int16),
    "bits as a larger type": lambda x: x[:, :2].contiguous().view(torch.int64),
    "composite operations": lambda x: torch.cat(x.float().square().chunk(2), dim=1),
    "rows by a tensor": lambda x: x[x[0].long() % 2],
    "rows of a view by a tensor": lambda x: x[:, 1:][x[0].long() % 2],
    "a mask": lambda x: x.float().masked_fill(x > 2, -torch.inf),
    "rows written by a tensor": lambda x: x.index_put_((x[:, 1].long() % 2,), x.flip(0)),
    "sums without end": lambda x: x.long().cumsum(1) * 2**40,
}


@pytest.mark.parametrize("name", STEPS)
def test_programs_compute_what_torch_does(bridge, name):
    expected = STEPS[name](X.clone())
    got = run(bridge, STEPS[name], X.clone())
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(got, expected)


def test_a_program_may_return_what_it_was_given(bridge):
    assert torch.equal(run(bridge, lambda x: x, X), X)


def add_and_count(count, x, y, *, factor):
    return count + 1, x + factor * y, x.astype(jnp.float32)


def test_functions_of_jax_run_alike_inside_and_outside_of_programs(bridge):
    state = bridge.allocate((2,), torch.int32)
    one, two = bridge.apply(add_and_count, X, 2 * X, states=[state], factor=3)
    assert (one.tolist(), two.dtype) == ((7 * X).tolist(), torch.float32)
    inside = run(bridge, lambda x: bridge.apply(add_and_count, x, 2 * x, states=[state], factor=3)[0], X)
    assert torch.equal(inside, one)
    assert state.tensor.jax().tolist() == [2, 2]
    bridge.apply(add_and_count, X, X, states=[state], factor=1)
    assert state.tensor.jax().tolist() == [3, 3]


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bool], ids=str
)
def test_weights_of_every_dtype_are_read(bridge, dtype):
    host = torch.tensor([[0.5, 1.0], [-2.0, 0.0]]).to(dtype)
    adopted = bridge.adopt(host.t())
    got = run(bridge, lambda x: adopted.float() * x, torch.ones(1, dtype=torch.int32))
    assert torch.equal(got, host.t().float())


def test_an_adopted_tensor_does_not_follow_the_host(bridge):
    host = torch.ones(2)
    adopted = bridge.adopt(host)
    host.zero_()
    assert run(bridge, lambda x: adopted * x, torch.ones(1, dtype=torch.int32)).tolist() == [1, 1]


def test_a_failed_trace_leaves_everything_as_it_was(bridge):
    adopted = bridge.adopt(torch.ones(2))

    def fails(x):
        adopted.add_(1)
        raise ValueError("here")

    with pytest.raises(ValueError, match="here"):
        run(bridge, fails, X)
    assert adopted.jax().tolist() == [1, 1]
    assert run(bridge, lambda x: adopted + x, torch.ones(1, dtype=torch.int32)).tolist() == [2, 2]
    (outside,) = bridge.apply(lambda x: (x * 2,), X)
    assert torch.equal(outside, 2 * X)
