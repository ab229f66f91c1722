"""How products with narrow weights are taken, for the shapes that were measured."""

import pytest
import torch

from dovetail_cuda import narrow_ways
from dovetail_cuda.kernels.narrow import Codes
from dovetail_cuda.narrow_ways import Way, way

HOPPER = 132
"""Multiprocessors."""


def chosen(tokens, outputs, inputs=4096, group=None, columns=None, pairs=False):
    weight = torch.empty((outputs, inputs // 2 if pairs else inputs), dtype=torch.int8, device="meta")
    x_TI = torch.empty((tokens, columns or inputs), dtype=torch.bfloat16, device="meta")[:, :inputs]
    codes = Codes(weight.to(torch.uint8) if pairs else weight, torch.empty(0), None, group or inputs)
    return way(x_TI, codes, HOPPER)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(narrow_ways, "has_engine", lambda device: True)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("tokens", "outputs", "of_8_bits", "of_4_bits"),
    [
        (0, 4096, Way.STREAM, Way.STREAM),
        (64, 28672, Way.STREAM, Way.STREAM),
        (128, 4096, Way.STREAM, Way.STREAM),
        (256, 28672, Way.ROWS_256, Way.ROWS_256),
        (512, 4096, Way.ROWS_128, Way.STREAM),
        (512, 6144, Way.ROWS_256, Way.ROWS_256),
        (1024, 4096, Way.ROWS_256, Way.WIDEN_FIRST),
        (1024, 6144, Way.WIDEN_FIRST, Way.WIDEN_FIRST),
        (1536, 28672, Way.ROWS_256, Way.WIDEN_FIRST),
        (2048, 6144, Way.ROWS_256, Way.WIDEN_FIRST),
        (2049, 4096, Way.WIDEN_FIRST, Way.WIDEN_FIRST),
    ],
)
def test_fastest(tokens, outputs, of_8_bits, of_4_bits):
    assert chosen(tokens, outputs) is of_8_bits
    assert chosen(tokens, outputs, pairs=True) is of_4_bits


@pytest.mark.usefixtures("hopper")
def test_what_the_copy_engine_cannot_read():
    assert chosen(1024, 4096) is Way.ROWS_256
    assert chosen(1024, 4096, columns=4100) is Way.WIDEN_FIRST
    assert chosen(1024, 4096, inputs=4104) is Way.WIDEN_FIRST
    assert chosen(1024, 4096, group=32) is Way.WIDEN_FIRST
    assert chosen(1024, 4096, group=128) is Way.ROWS_256


@pytest.mark.parametrize(("tokens", "expected"), [(64, Way.STREAM), (512, Way.STREAM), (513, Way.WIDEN_FIRST)])
def test_other_chips(tokens, expected):
    assert chosen(tokens, 4096) is expected
