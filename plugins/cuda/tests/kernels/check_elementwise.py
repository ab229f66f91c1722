"""Norms, activations, rotary positions and the KV write."""

import pytest
import torch
from inputs import DEVICE, DTYPES, close, randn

from dovetail.ops import reference
from dovetail_cuda.kernels import activation, norm
from dovetail_cuda.kernels.cache import write_kv
from dovetail_cuda.kernels.rotary import rotary


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(0, 8), (1, 7), (5, 100), (3, 4096)])
def test_norms(dtype, tokens, width):
    x, residual = randn(tokens, width, dtype=dtype), 3 * randn(tokens, width, dtype=dtype, seed=1)
    for weight in (randn(width, dtype=dtype, seed=2), 1 + 0.01 * randn(width, seed=2)):
        if tokens:
            close(norm.rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight.double(), 1e-5), dtype)
        normed, total = norm.add_rms_norm(x, residual, weight, 1e-5)
        assert torch.equal(total, x + residual)
        if tokens:
            close(normed, reference.rms_norm(total.double(), weight.double(), 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_views(dtype):
    merged, weight = randn(9, 8, 40, dtype=dtype), randn(40, dtype=dtype, seed=1)
    for x in (merged[:, 2:7], merged[:, 1], merged.transpose(0, 1), merged[..., :40:2]):
        w = weight[: x.shape[-1]]
        close(norm.rms_norm(x, w, 1e-5), reference.rms_norm(x.double(), w.double(), 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
@pytest.mark.parametrize(("tokens", "width"), [(0, 8), (1, 7), (5, 1100)])
def test_activations(dtype, name, tokens, width):
    x = 4 * randn(tokens, 2 * width + 6, dtype=dtype)[:, 6:]
    out, expected = getattr(activation, name)(x), getattr(reference, name)(x.double())
    assert out.shape == expected.shape
    if tokens:
        close(out, expected, dtype)


@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
def test_extreme_gates(name):
    gates = torch.tensor([-1e30, -200.0, -20.0, 20.0, 200.0, 1e30], device=DEVICE)
    x = torch.stack([gates, torch.ones_like(gates)], dim=1)
    out, expected = getattr(activation, name)(x), getattr(reference, name)(x.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "turned"), [(64, 64), (40, 24), (256, 64)])
def test_rotary(dtype, size, turned):
    merged, table = randn(11, 8, size, dtype=dtype), randn(50, turned, seed=1)
    positions = (torch.arange(11, device=DEVICE) * 17 + 3) % 50
    q, k, v = merged.split_with_sizes([5, 2, 1], 1)
    expected = reference.rotary(q.double(), k.double(), positions, table)
    before = v.clone()
    for out, want in zip(rotary(q, k, positions, table), expected, strict=True):
        close(out, want, dtype)
    assert torch.equal(v, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_kv(dtype):
    merged, slots = randn(5, 9, 24, dtype=dtype), torch.tensor([31, 8, 9, 40, 17], device=DEVICE)
    _, k, v = merged.split_with_sizes([3, 3, 3], 1)
    for shape, order in (((2, 6, 8, 3, 24), (0, 1, 2, 3)), ((2, 6, 3, 24, 8), (0, 3, 1, 2))):
        caches, wanted = (torch.zeros(shape, dtype=dtype, device=DEVICE) for _ in range(2))
        write_kv(k, v, *(x.permute(order) for x in caches), slots)
        reference.write_kv(k, v, *(x.permute(order) for x in wanted), slots)
        assert torch.equal(caches, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_kv_finite(dtype):
    largest = torch.finfo(dtype).max
    given = torch.tensor([torch.inf, -torch.inf, torch.nan, largest, 1.5], dtype=dtype, device=DEVICE).view(1, 1, 5)
    stored, kept = (torch.zeros((2, 2, 4, 1, 5), dtype=dtype, device=DEVICE) for _ in range(2))
    slots = torch.tensor([6], device=DEVICE)
    write_kv(given, given, *stored, slots, finite=True)
    write_kv(given, given, *kept, slots)
    assert stored[:, 1, 2, 0].tolist() == [[largest, -largest, 0.0, largest, 1.5]] * 2
    assert str(kept[:, 1, 2, 0].tolist()) == str([given.flatten().tolist()] * 2), "as it is, NaN included"
