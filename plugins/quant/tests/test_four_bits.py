"""Checkpoints of GPTQ and AWQ, packed value by value, against plain ones of the same weights."""

from __future__ import annotations

import random

import pytest
import torch

from dovetail.errors import ConfigError, ModelLoadError
from dovetail_quant.awq import Awq
from dovetail_quant.gptq import Gptq

rng = random.Random(5)
PROMPTS = [[rng.randrange(96) for _ in range(n)] for n in (1, 7, 30, 41)]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False, "sym": True, "damp_percent": 0.1}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True, "version": "gemm"}
INTERLEAVED = (0, 2, 4, 6, 1, 3, 5, 7)
"""The outputs of a word of AWQ, from the lowest bits on."""


class Quantized:
    """A layer in 4 bits: values, the group of each input, scales and zero points of groups."""

    def __init__(self, weight, size, *, symmetric, shuffled=False):
        outputs, inputs = weight.shape
        size = inputs if size == -1 else size
        self.groups = torch.arange(inputs) // size
        if shuffled:
            self.groups = self.groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
        self.values = torch.zeros(outputs, inputs, dtype=torch.int64)
        self.scales = torch.zeros(inputs // size, outputs)
        self.zeros = torch.zeros(inputs // size, outputs, dtype=torch.int64)
        for g in range(inputs // size):
            part = weight[:, self.groups == g]
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            self.scales[g] = part.abs().amax(1) / 7 if symmetric else (high - low) / 15
            self.zeros[g] = 8 if symmetric else (-low / self.scales[g]).round().long()
            steps = (part / self.scales[g].unsqueeze(1)).round().long()
            self.values[:, self.groups == g] = (steps + self.zeros[g].unsqueeze(1)).clamp(0, 15)
        self.plain = (self.values - self.zeros[self.groups].t()) * self.scales[self.groups].t()


def word(values):
    """Eight values, the first in the lowest bits, as a signed number of 32 bits."""
    number = sum(int(value) << (4 * i) for i, value in enumerate(values))
    return number - (1 << 32) if number >= 1 << 31 else number


def words_down(values):
    """Eight rows become one."""
    rows = [[word(values[r : r + 8, c]) for c in range(values.shape[1])] for r in range(0, len(values), 8)]
    return torch.tensor(rows, dtype=torch.int32)


def words_across(values, order=range(8)):
    """Eight columns become one."""
    columns = range(0, values.shape[1], 8)
    return torch.tensor([[word([row[c + i] for i in order]) for c in columns] for row in values], dtype=torch.int32)


def gptq(weight, section):
    layer = Quantized(weight, section["group_size"], symmetric=section["sym"], shuffled=section["desc_act"])
    less = 0 if section.get("checkpoint_format") == "gptq_v2" else 1
    zeros = layer.zeros.clamp(min=less)  # the first format cannot say 0
    layer.plain = (layer.values - zeros[layer.groups].t()) * layer.scales[layer.groups].t()
    stored = {
        "qweight": words_down(layer.values.t()),
        "qzeros": words_across(zeros - less),
        "scales": layer.scales,
        "g_idx": layer.groups.int(),
    }
    return stored, layer.plain


def awq(weight, section):
    layer = Quantized(weight, section["group_size"], symmetric=False)
    stored = {
        "qweight": words_across(layer.values.t(), INTERLEAVED),
        "qzeros": words_across(layer.zeros, INTERLEAVED),
        "scales": layer.scales,
    }
    return stored, layer.plain


CASES = {
    "gptq": (gptq, GPTQ),
    "gptq, zero points": (gptq, {**GPTQ, "sym": False}),
    "gptq, in order of importance": (gptq, {**GPTQ, "sym": False, "desc_act": True}),
    "gptq, second format": (gptq, {**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"}),
    "gptq, whole rows": (gptq, {**GPTQ, "group_size": -1}),
    "awq": (awq, AWQ),
    "awq, older names": (awq, {"quant_method": "awq", "w_bit": 4, "q_group_size": 8, "zero_point": True}),
}


@pytest.mark.parametrize(
    ("kind", "case"), [*(("dense", case) for case in CASES), ("sparse", "gptq, zero points"), ("sparse", "awq")]
)
def test_equals_plain_weights_of_the_same_values(checkpoints, generate, kind, case):
    pack, section = CASES[case]
    read = {"group_size": section.get("q_group_size"), **section}
    plain = checkpoints.write(kind, lambda _, weight: {"weight": pack(weight, read)[1]})
    packed = checkpoints.write(kind, lambda _, weight: pack(weight, read)[0], quantization_config=section)
    expected, actual = generate(plain, PROMPTS), generate(packed, PROMPTS)
    assert [c.token_ids for c in actual] == [c.token_ids for c in expected]


def test_parts_of_a_layer_share_their_order(checkpoints, generate):
    section = {**GPTQ, "desc_act": True}

    def quantize(name, weight):
        stored = gptq(weight, section)[0]
        return {**stored, "g_idx": stored["g_idx"].flip(0)} if name.endswith("k_proj") else stored

    path = checkpoints.write("dense", quantize, quantization_config=section)
    with pytest.raises(ModelLoadError, match="g_idx"):
        generate(path, PROMPTS[:1])


@pytest.mark.parametrize(
    ("desc_act", "groups", "message"),
    [(False, [1] * 8 + [0] * 8, "'desc_act'"), (True, [0] * 4 + [1] * 12, "'g_idx' of a layer has other groups")],
)
def test_orders_that_the_section_rules_out(desc_act, groups, message):
    stored = {**gptq(torch.randn(8, 16), GPTQ)[0], "g_idx": torch.tensor(groups, dtype=torch.int32)}
    with pytest.raises(ConfigError, match=message):
        Gptq({**GPTQ, "desc_act": desc_act}).prepare(stored, None, torch.float32)


@pytest.mark.parametrize(
    ("method", "section", "field", "value"),
    [
        (Gptq, GPTQ, "bits", 8),
        (Gptq, GPTQ, "group_size", 0),
        (Gptq, GPTQ, "group_size", "128"),
        (Gptq, GPTQ, "desc_act", "yes"),
        (Gptq, GPTQ, "checkpoint_format", "marlin"),
        (Gptq, GPTQ, "lm_head", True),
        (Gptq, GPTQ, "dynamic", {"+:mlp": {"bits": 8}}),
        (Awq, AWQ, "bits", 4.0),
        (Awq, AWQ, "version", "gemv"),
        (Awq, AWQ, "zero_point", False),
        (Awq, AWQ, "modules_to_not_convert", "visual"),
    ],
)
def test_refusals_name_field_and_value(method, section, field, value):
    with pytest.raises(ConfigError) as refusal:
        method({**section, field: value})
    assert repr(field) in str(refusal.value)
    assert repr(value) in str(refusal.value)


@pytest.mark.parametrize(("inputs", "outputs", "what"), [(16, 12, "12 outputs"), (20, 16, "20 inputs")])
def test_layers_that_words_do_not_divide(inputs, outputs, what):
    for method, section in ((Gptq, GPTQ), (Awq, AWQ)):
        with pytest.raises(ConfigError, match=what):
            method(section).tensors(inputs, outputs, torch.float32)


def test_which_layers():
    method = Awq({**AWQ, "modules_to_not_convert": ["visual", "layers.0."]})
    names = ["model.layers.1.mlp.down_proj", "model.layers.0.mlp.down_proj", "visual.blocks.0.qkv", "lm_head"]
    assert [method.applies_to(name) for name in names] == [True, False, False, False]
    assert [method.applies_to(f"model.layers.3.mlp.{name}") for name in ("gate", "experts")] == [False, True]
