"""Norms and gates quantize what only a layer in 8 bits reads; whoever expects a tensor gets one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dovetail.contracts.model import ModelContext
from dovetail.contracts.ops import OpTable
from dovetail.contracts.quant import PackedLinear, RowFormat, RowProduct
from dovetail.layers.block import Block
from dovetail.layers.decoder import DecoderLayer, SandwichLayer
from dovetail.layers.linear import Linear, Unquantized
from dovetail.layers.mlp import GatedMLP, RoutedMLP

D, F = 12, 20
OPS = OpTable()


class Narrow(Unquantized):
    """Weights stay as they are, activations go through 8 bits in groups; some layers stay plain."""

    def __init__(self, plain: str = "") -> None:
        self._plain = plain

    def applies_to(self, layer: str) -> bool:
        return layer != self._plain

    def prepare(self, tensors: Mapping[str, Tensor], ops: OpTable, dtype: torch.dtype) -> PackedLinear:
        return tensors["weight"]

    def apply(self, x_TI: Tensor, packed: PackedLinear, bias_O: Tensor | None, ops: OpTable) -> Tensor:
        return self.product(*ops.quantize_rows(x_TI, torch.int8, 8), packed, bias_O, x_TI.dtype, ops)

    def row_product(self) -> RowProduct:
        return RowProduct(RowFormat(torch.int8, 8), self.product)

    @staticmethod
    def product(x_TI: Tensor, scale_TG: Tensor, weight: Tensor, bias: Any, dtype: torch.dtype, ops: OpTable) -> Tensor:
        return ops.linear((x_TI * scale_TG.repeat_interleave(8, 1)[:, : x_TI.shape[1]]).to(dtype), weight, bias)


class Wide(Narrow):
    """The same, without saying so."""

    def row_product(self) -> None:
        return None


class Attention(nn.Module):
    """Stands for attention."""

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        self.proj = Linear(context, "proj", D, D)
        self.seen: list[type] = []

    @property
    def reads(self) -> RowFormat | None:
        return self.proj.reads

    def forward(self, x_TD: Any, *rest: Any) -> Tensor:
        self.seen.append(type(x_TD))
        return self.proj.forward_rows(x_TD)


class Own(Attention):
    """A plugin's, which takes what it always did."""

    def forward(self, x_TD: Tensor, *rest: Any) -> Tensor:
        return super().forward(1.5 * x_TD)


def context(quant: Unquantized, ops: OpTable = OPS) -> ModelContext:
    device = torch.device("cpu")
    return ModelContext(ops=ops, dtype=torch.bfloat16, device=device, quant=quant, max_model_len=1)


def loaded(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    for block in (part for part in module.modules() if isinstance(part, Block)):
        block.finalize(
            {name: torch.randn(spec.shape, generator=generator).to(spec.dtype) for name, spec in block.specs.items()}
        )
    return module


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("attention", [Attention, Own])
@pytest.mark.parametrize("layer", [DecoderLayer, SandwichLayer])
@pytest.mark.parametrize("plain", ["", "mlp.down_proj", "mlp.gate_up_proj", "proj"])
@pytest.mark.parametrize("first", [True, False])
def test_a_layer_gives_the_same_bits(layer: Any, attention: Any, plain: str, first: bool) -> None:
    results = []
    for quant in (Narrow(plain), Wide(plain)):
        made = context(quant)
        part = attention(made)
        run = loaded(layer(made, part, GatedMLP(made, "mlp", D, F), hidden_size=D, norm_eps=1e-5))
        results.append(run.forward(randn(5, D), None if first else randn(5, D, seed=1), None, None))
        narrow = attention is Attention and plain != "proj" and type(quant) is Narrow
        assert part.seen == [tuple if narrow else Tensor]
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


def test_what_is_quantized_at_once() -> None:
    """The norms but of a stream's beginning, and the gate, with the format of the layer behind."""
    calls: list[tuple[str, Any]] = []

    def noted(name: str) -> Any:
        def call(*args: Any) -> Any:
            calls.append((name, args[-2:]))
            return getattr(OPS, name)(*args)

        return call

    ops = OpTable(**{name: noted(name) for name in ("add_rms_norm_quantize", "silu_and_mul_quantize")})
    made = context(Narrow(), ops)
    layer = loaded(DecoderLayer(made, Attention(made), GatedMLP(made, "mlp", D, F), hidden_size=D, norm_eps=1e-5))
    layer.forward(randn(5, D), randn(5, D), None, None)
    form = (torch.int8, 8)
    assert calls == [
        (name, form) for name in ("add_rms_norm_quantize", "add_rms_norm_quantize", "silu_and_mul_quantize")
    ]
    calls.clear()
    layer.forward(randn(5, D), None, None, None)
    assert [name for name, _ in calls] == ["add_rms_norm_quantize", "silu_and_mul_quantize"]


def test_a_router_reads_wide_rows() -> None:
    made = context(Narrow())
    mlp = RoutedMLP(made, "mlp", D, F, num_experts=3, num_active=2, normalize=True)
    layer = loaded(DecoderLayer(made, Attention(made), mlp, hidden_size=D, norm_eps=1e-5))
    seen: list[Any] = []
    layer._mlp = lambda x_TD: seen.append(x_TD) or x_TD
    layer.forward(randn(5, D), randn(5, D), None, None)
    assert type(seen[0]) is Tensor
