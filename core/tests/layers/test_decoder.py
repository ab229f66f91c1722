"""The last layer goes on with the rows that matter alone, if its attention knows how to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dovetail.contracts.model import ModelContext
from dovetail.contracts.ops import OpTable
from dovetail.layers.attention import SelfAttention
from dovetail.layers.block import Block
from dovetail.layers.decoder import Decoder, DecoderLayer, SandwichLayer
from dovetail.layers.linear import Unquantized
from dovetail.layers.rotary import frequencies, rotary_table
from dovetail.runner.bound_attention import BoundAttention
from dovetail.testing.conformance import tiny

TOKENS = 7
CONTEXT = ModelContext(
    ops=OpTable(), dtype=torch.float32, device=torch.device("cpu"), quant=Unquantized(), max_model_len=TOKENS
)


class OwnAttention(nn.Module):
    """A plugin's, which reaches the cache in the way that every model may, and returns all rows."""

    def forward(self, x_TD: Tensor, positions_T: Tensor, attend: Any) -> Tensor:
        heads = x_TD.view(len(x_TD), -1, tiny.HEAD_SIZE)
        return attend(0, heads, heads, heads).flatten(1)


def core_attention() -> SelfAttention:
    cos_sin_PK = rotary_table(frequencies(tiny.HEAD_SIZE, tiny.ROTARY_BASE), TOKENS, CONTEXT.device)
    return SelfAttention(CONTEXT, "self_attn", 0, tiny.spec(None), tiny.HIDDEN_SIZE, cos_sin_PK)


def decoder(layer: type[nn.Module], attention: nn.Module) -> Decoder:
    """One layer, with random weights."""
    generator = torch.Generator().manual_seed(5)
    made = layer(CONTEXT, attention, nn.Identity(), hidden_size=tiny.HIDDEN_SIZE, norm_eps=tiny.EPS)  # type: ignore[call-arg]
    model = Decoder(CONTEXT, [made], vocab_size=tiny.VOCAB_SIZE, hidden_size=tiny.HIDDEN_SIZE, norm_eps=tiny.EPS)
    for block in (module for module in model.modules() if isinstance(module, Block)):
        block.finalize({name: torch.randn(spec.shape, generator=generator) for name, spec in block.specs.items()})
    return model


def mean_so_far(q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor, *_: Any) -> Tensor:
    v_THK = v_TNK.repeat_interleave(q_THK.shape[1] // v_TNK.shape[1], 1)
    return (v_THK.cumsum(0) / torch.arange(1, len(v_THK) + 1)[:, None, None]).flatten(1)


def hidden(model: Decoder, wanted_S: Tensor | None) -> Tensor:
    def projected(qkv_TE: Tensor, positions_T: Tensor, preparation: Any, *layer: Any) -> Tensor:
        return mean_so_far(*preparation.heads(qkv_TE, positions_T, tiny.spec(None)))

    backend: Any = SimpleNamespace(forward=mean_so_far, forward_projected=projected)
    attend = BoundAttention(backend, [None], [None], [tiny.spec(None)], {0: 0}, wanted_S)
    return model(torch.arange(TOKENS), torch.arange(TOKENS), attend)


@pytest.mark.parametrize("layer", [DecoderLayer, SandwichLayer])
@pytest.mark.parametrize("own", [False, True], ids=["the core's attention", "a plugin's"])
def test_wanted_rows_are_those_of_all(layer: type[nn.Module], own: bool) -> None:
    model = decoder(layer, OwnAttention() if own else core_attention())
    wanted_S = torch.tensor([2, 6])
    every, some = hidden(model, None), hidden(model, wanted_S)
    assert len(every) == TOKENS
    torch.testing.assert_close(some, every if own else every[wanted_S])
