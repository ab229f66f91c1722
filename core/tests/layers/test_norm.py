"""Norms stored as a distance from 1, embeddings that are scaled, heads that are capped, and sandwiched layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dovetail.contracts.model import ModelContext
from dovetail.contracts.ops import OpTable
from dovetail.layers.decoder import SandwichLayer
from dovetail.layers.embedding import Embedding
from dovetail.layers.head import Head
from dovetail.layers.linear import Unquantized
from dovetail.layers.norm import RMSNorm

D = 8


def context(dtype: torch.dtype) -> ModelContext:
    return ModelContext(ops=OpTable(), dtype=dtype, device=torch.device("cpu"), quant=Unquantized(), max_model_len=1)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offset_is_added_in_float32(dtype: torch.dtype) -> None:
    """Weights this small vanish in ``1 + weight`` if that is rounded to bfloat16."""
    weight = (randn(D) * 1e-3).to(dtype)
    norm = RMSNorm(context(dtype), D, 1e-6, offset=1.0)
    assert norm.specs["weight"].dtype is torch.float32
    norm.finalize({"weight": weight.float()})
    x = randn(50, D, seed=1).to(dtype)
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6) * (1 + weight.double())
    assert norm.forward(x).dtype is dtype
    torch.testing.assert_close(norm.forward(x), exact.to(dtype), rtol=1e-6, atol=0)
    assert torch.equal(norm.add(x, x)[0], norm.forward(2 * x))


def test_embedding_scale_is_rounded_to_the_dtype() -> None:
    """The root of 3072 is 55.4256, and 55.5 in bfloat16."""
    for dtype, factor in ((torch.float32, 3072**0.5), (torch.bfloat16, 55.5)):
        embedding = Embedding(context(dtype), 5, D, scale=3072**0.5)
        table = randn(5, D).to(dtype)
        embedding.finalize({"weight": table})
        ids = torch.tensor([4, 0, 4])
        expected = (table.double()[ids] * torch.tensor(factor).double()).to(dtype)
        torch.testing.assert_close(embedding.forward(ids), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_capped_logits(dtype: torch.dtype) -> None:
    head = Head(context(dtype), "head", D, 5, soft_cap=1.5)
    weight, x = randn(5, D).to(dtype), randn(3, D, seed=1).to(dtype)
    head.finalize({"weight": weight})
    logits = nn.functional.linear(x, weight)
    out = head.forward(x)
    assert out.dtype is dtype
    assert out.abs().max() <= 1.5
    torch.testing.assert_close(out, (1.5 * (logits.double() / 1.5).tanh()).to(dtype))


class Times(nn.Module):
    """Stands for attention or feed-forward."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor = factor

    def forward(self, x_TD: Tensor, *rest: Any) -> Tensor:
        return torch.sin(x_TD * self._factor)


def test_sandwich_layer() -> None:
    """Each block stands between two norms, outside of which the stream passes."""
    layer = SandwichLayer(context(torch.float32), Times(2), Times(3), hidden_size=D, norm_eps=1e-5, norm_offset=1.0)
    norms = ["input", "post_attention", "pre_feedforward", "post_feedforward"]
    weights = [randn(D, seed=seed) for seed in range(4)]
    for name, weight in zip(norms, weights, strict=True):
        getattr(layer, f"{name}_layernorm").finalize({"weight": weight})

    def norm(x: Tensor, index: int) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (1 + weights[index].double())

    x, residual = randn(4, D, seed=5), randn(4, D, seed=6)
    for before in (None, residual):
        stream = x.double() if before is None else x.double() + before.double()
        expected = stream + norm(torch.sin(2 * norm(stream, 0)), 1)
        expected = expected + norm(torch.sin(3 * norm(expected, 2)), 3)
        out, after = layer.forward(x, before, torch.arange(4), None)
        torch.testing.assert_close((out + after).double(), expected, rtol=1e-5, atol=1e-5)
