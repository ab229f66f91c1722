"""Weights that only have a model's shapes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dovetail.contracts.executor import Progress
from dovetail.contracts.model import WeightTable
from dovetail.contracts.quant import TensorSpec
from dovetail.layers.block import Block
from dovetail.runner.dummy_weights import LARGEST, fill_with_noise
from dovetail.runner.loader import weight_bytes

CPU = torch.device("cpu")


class Kept(Block):
    def accept(self, tensors):
        self.kept: dict[str, Tensor] = dict(tensors)


class Tiny(nn.Module):
    """A head that is tied, before what it is tied to; a scale of one byte, codes, and a bias that may be absent."""

    def __init__(self):
        super().__init__()
        wide = TensorSpec(shape=(64, 32), dtype=torch.bfloat16)
        self.head = Kept(CPU, {"weight": wide})
        self.embed = Kept(CPU, {"weight": wide})
        specs = {
            "weight": TensorSpec(shape=(8, 16), dtype=torch.float8_e4m3fn),
            "codes": TensorSpec(shape=(8,), dtype=torch.int32),
            "bias": TensorSpec(shape=(8,), dtype=torch.float32, optional=True),
        }
        self.up = Kept(CPU, specs)

    def weight_table(self):
        return WeightTable(tied={"head.weight": "embed.weight"})


def test_every_block_is_filled_within_bounds():
    fill_with_noise(model := Tiny(), Progress())
    weight = model.embed.kept["weight"].float()
    assert weight.abs().max() <= LARGEST
    assert weight.std() > LARGEST / 3
    assert model.head.kept["weight"] is model.embed.kept["weight"]
    assert sorted(model.up.kept) == ["codes", "weight"]
    assert not model.up.kept["codes"].any()
    assert model.up.kept["weight"].float().abs().max() <= 2 * LARGEST


def test_their_size_is_known_before():
    model = Tiny()
    size = weight_bytes(model)
    fill_with_noise(model, Progress())
    assert size == sum(x.nbytes for block in (model.embed, model.up) for x in block.kept.values())


def test_every_start_has_the_same():
    first, second = Tiny(), Tiny()
    for model in (first, second):
        fill_with_noise(model, Progress())
    assert torch.equal(first.embed.kept["weight"], second.embed.kept["weight"])
