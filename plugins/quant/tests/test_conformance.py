"""Our number formats, in the public form. Errors are those of 8 bits on normally distributed numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dovetail.testing.conformance import QuantSuite, registered

PER_TENSOR = {"quant_method": "fp8", "activation_scheme": "dynamic"}
STATIC = {"quant_method": "fp8", "activation_scheme": "static"}
BLOCKS = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head"],
}
LARGEST = torch.finfo(torch.float8_e4m3fn).max
INPUTS = 5.0
"""Largest normally distributed input that a static scale is made for."""


class TestInt8(QuantSuite):
    subject = registered("int8")
    error = 0.012


class TestInt8W8A8(QuantSuite):
    subject = registered("int8-w8a8")
    error = 0.015


class TestFp8W8A8(QuantSuite):
    subject = registered("fp8-w8a8")
    error = 0.045


class TestFp8(QuantSuite):
    subject = registered("fp8")
    error = 0.045
    sections = (PER_TENSOR, STATIC, BLOCKS)

    @staticmethod
    def store(weight_OI: Tensor, section: Mapping[str, Any]) -> Mapping[str, Tensor]:
        if "weight_block_size" in section:
            return in_blocks(weight_OI, *section["weight_block_size"])
        scale = scale_of(weight_OI.abs().max())
        stored = {"weight": (weight_OI / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
        if section["activation_scheme"] == "static":
            stored["input_scale"] = torch.tensor(INPUTS / LARGEST)
        return stored


def scale_of(largest: Tensor) -> Tensor:
    """By which to divide so that ``largest`` becomes the largest number of the format."""
    return torch.where(largest > 0, largest / LARGEST, 1.0).clamp(min=1e-12)


def in_blocks(weight_OI: Tensor, outputs: int, inputs: int) -> Mapping[str, Tensor]:
    """A scale per block; blocks at the edges are smaller."""
    blocks = [part.split(inputs, dim=1) for part in weight_OI.split(outputs)]
    scales = torch.stack([torch.stack([scale_of(block.abs().max()) for block in row]) for row in blocks])
    wide = scales.repeat_interleave(outputs, 0).repeat_interleave(inputs, 1)
    values = weight_OI / wide[: len(weight_OI), : weight_OI.shape[1]]
    return {"weight": values.to(torch.float8_e4m3fn), "weight_scale_inv": scales}
