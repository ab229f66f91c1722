"""Our number formats, in the public form. Errors are those of 8 and 4 bits on normally distributed numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dovetail.testing.conformance import PluginSuite, QuantSuite, registered

PER_TENSOR = {"quant_method": "fp8", "activation_scheme": "dynamic"}
STATIC = {"quant_method": "fp8", "activation_scheme": "static"}
BLOCKS = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head"],
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "damp_percent": 0.1}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
INTERLEAVED = (0, 2, 4, 6, 1, 3, 5, 7)
"""The outputs of a word of AWQ, from the lowest bits on."""
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


class TestGptq(QuantSuite):
    subject = registered("gptq")
    error = 0.125
    sections = (
        GPTQ,
        {**GPTQ, "group_size": -1},
        {**GPTQ, "group_size": 16, "sym": False, "desc_act": True},
        {**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"},
    )

    @staticmethod
    def store(weight_OI: Tensor, section: Mapping[str, Any]) -> Mapping[str, Tensor]:
        less = 0 if section.get("checkpoint_format") == "gptq_v2" else 1
        group_I = groups(weight_OI.shape[1], section["group_size"], shuffled=section["desc_act"])
        layer = in_4_bits(weight_OI, group_I, symmetric=section["sym"], lowest=less)
        return {
            "qweight": words(layer.value_OI).t().contiguous(),
            "qzeros": words(layer.zero_GO - less),
            "scales": layer.scale_GO,
            "g_idx": group_I.int(),
        }


class TestAwq(QuantSuite):
    subject = registered("awq")
    error = 0.09
    sections = (
        {**AWQ, "modules_to_not_convert": ["lm_head"]},
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 16, "zero_point": True},
    )

    @staticmethod
    def store(weight_OI: Tensor, section: Mapping[str, Any]) -> Mapping[str, Tensor]:
        size = section["group_size"] if "group_size" in section else section["q_group_size"]
        layer = in_4_bits(weight_OI, groups(weight_OI.shape[1], size), symmetric=False)
        return {
            "qweight": words(layer.value_OI.t(), INTERLEAVED),
            "qzeros": words(layer.zero_GO, INTERLEAVED),
            "scales": layer.scale_GO,
        }


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


class Groups(NamedTuple):
    """A layer in 4 bits: a weight is ``(value - zero) × scale``, with those of the group of its input."""

    value_OI: Tensor
    zero_GO: Tensor
    scale_GO: Tensor


def groups(inputs: int, size: int, *, shuffled: bool = False) -> Tensor:
    """The group of each input; all parts of a layer have the same."""
    group_I = torch.arange(inputs) // (inputs if size == -1 else size)
    return group_I[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))] if shuffled else group_I


def in_4_bits(weight_OI: Tensor, group_I: Tensor, *, symmetric: bool, lowest: int = 0) -> Groups:
    """Round to a grid per output and group; ``lowest`` is the smallest zero point that can be stored."""
    members = weight_OI[:, group_I.argsort(stable=True)].unflatten(1, (int(group_I.max()) + 1, -1))
    low_OG, high_OG = members.amin(2).clamp(max=0), members.amax(2).clamp(min=0)
    if symmetric:
        high_OG = torch.maximum(high_OG, -low_OG)
        low_OG = -high_OG
    step_OG = torch.where(high_OG > low_OG, (high_OG - low_OG) / 15, 1.0)
    zero_OG = (8 if symmetric else (-low_OG / step_OG).round().clamp(min=lowest)) + torch.zeros_like(step_OG)
    value_OI = ((weight_OI / step_OG[:, group_I]).round() + zero_OG[:, group_I]).clamp(0, 15)
    return Groups(value_OI.long(), zero_OG.t().long(), step_OG.t().half().contiguous())


def words(values: Tensor, order: Sequence[int] = range(8)) -> Tensor:
    """Eight columns become one of int32; the first of ``order`` lies in the lowest bits."""
    eights = values.unflatten(1, (-1, 8))[:, :, list(order)]
    return (eights << 4 * torch.arange(8)).sum(2).to(torch.uint32).view(torch.int32)


class TestPlugin(PluginSuite):
    plugin = "quant"
