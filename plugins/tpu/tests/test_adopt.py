"""What a model's modules hold goes to the chip, once each, wherever they hold it."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dovetail.tensors import leaves
from dovetail_tpu import bridges
from dovetail_tpu.adopt import Adoption
from dovetail_tpu.bridges.transfers import tensor_of


class Pair(NamedTuple):
    codes: Tensor
    scales: Tensor


@dataclass(frozen=True, slots=True)
class Held:
    table: Tensor
    name: str


class Inner(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.tied = shared
        self.parameter = nn.Parameter(torch.ones(2, 3))
        self.register_buffer("buffer", torch.arange(4))
        self.absent = None

    def forward(self, x):
        return x @ self.parameter + self.buffer[:3]


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        shared = torch.rand(5, 4)
        self.embedding = shared
        self.packed = Pair(torch.ones(3, 2, dtype=torch.int8), torch.rand(3, 1))
        self.nested = {"a": [Held(torch.rand(2), "b")], "size": 7}
        self.inner = Inner(shared)


@pytest.fixture
def bridge():
    return bridges.open_bridge("jax")


def test_every_tensor_is_adopted_in_place(bridge):
    model = Outer()
    embedding = model.embedding.clone()
    assert Adoption(bridge).of(model) is model
    held = [leaf for module in model.modules() for leaf in leaves([*vars(module).values()]) if isinstance(leaf, Tensor)]
    assert len(held) == 7
    assert {tensor.device.type for tensor in held} == {"jax"}
    assert model.embedding is model.inner.tied
    assert type(model.packed) is Pair
    assert model.nested["size"] == 7
    assert torch.equal(tensor_of(model.embedding.jax()), embedding)
    assert not list(model.parameters())


def test_programs_read_what_were_parameters_and_buffers(bridge):
    model = Inner(torch.zeros(1))
    expected = model(torch.full((1, 2), 2.0)).detach()
    Adoption(bridge).of(model)
    traced = bridge.trace(lambda packed_W: [model(packed_W.view(1, 2).float())], 2)
    (got,) = bridge.to_host(bridge.call(bridge.compile(traced), torch.full((2,), 2, dtype=torch.int32)))
    assert torch.equal(got, expected)


def test_the_host_keeps_nothing(bridge):
    module = nn.Module()
    module.weight = torch.full((1234,), 3.0)
    Adoption(bridge).of(module)
    gc.collect()
    assert not [x for x in gc.get_objects() if type(x) is Tensor and x.shape == (1234,)]


def test_tensors_of_the_host_go_one_by_one(bridge, monkeypatch):
    """At the start of each copy, the one before is gone."""
    model = nn.Sequential(*(nn.Linear(3, 5) for _ in range(2)))
    model.packed = Pair(torch.ones(7, 2), torch.rand(7, 1))
    alive, refs, adopt = [], [], bridge.adopt

    def watched(host, spec=()):
        refs.append(weakref.ref(host))
        alive.append(sum(ref() is not None for ref in refs))
        return adopt(host, spec)

    monkeypatch.setattr(bridge, "adopt", watched)
    gc.disable()
    try:
        Adoption(bridge).of(model)
    finally:
        gc.enable()
    assert alive == [1, 2, 1, 1, 1, 1]  # the container's go together
    assert not any(ref() for ref in refs)


def test_containers_are_made_anew(bridge):
    tables = Held(torch.arange(3.0), "counts")
    adopted = Adoption(bridge).of(tables)
    assert adopted.name == "counts"
    assert tables.table.device.type == "cpu"
    assert torch.equal(tensor_of(adopted.table.jax()), tables.table)
