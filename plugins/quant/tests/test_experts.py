"""Experts that a platform multiplies together give what each gives on its own."""

from __future__ import annotations

import pytest
import torch

from dovetail.contracts.model import ModelContext
from dovetail.contracts.ops import OpTable
from dovetail.layers.experts import Experts
from dovetail.ops import reference
from dovetail_quant.awq import Awq
from dovetail_quant.fp8 import Fp8
from dovetail_quant.gptq import Gptq
from dovetail_quant.w8a8 import Fp8W8A8, Int8W8A8
from dovetail_quant.weight_only import Int8

EXPERTS, HIDDEN, INNER = 3, 48, 32
ORDERED = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": True}
METHODS = {
    "int8": (Int8, None),
    "fp8": (Fp8, None),
    "int8-w8a8": (Int8W8A8, None),
    "fp8-w8a8": (Fp8W8A8, None),
    "fp8 in blocks": (Fp8, {"quant_method": "fp8", "weight_block_size": [16, 24]}),
    "fp8 per tensor": (Fp8, {"quant_method": "fp8"}),
    "fp8 per tensor, static": (Fp8, {"quant_method": "fp8", "activation_scheme": "static"}),
    "gptq": (Gptq, {**ORDERED, "desc_act": False}),
    "gptq, in order of importance": (Gptq, ORDERED),
    "awq": (Awq, {"quant_method": "awq", "bits": 4, "group_size": 8}),
}


def together(*arguments):
    together.calls += 1
    return reference.quantized_experts_mm(*arguments)


def filled(specs, ordered):
    """Tensors of these specs: any bits are weights, and scales are small."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for suffix, spec in specs.items():
        numbers = torch.rand(spec.shape, generator=generator)
        if suffix == "g_idx":
            groups = torch.arange(spec.shape[0]) // 8
            tensors[suffix] = groups.flip(0) if ordered else groups
        elif spec.dtype == torch.int32:
            tensors[suffix] = ((numbers - 0.5) * 2**32).long().clamp(-(2**31), 2**31 - 1).int()
        elif "scale" in suffix:
            tensors[suffix] = torch.full(spec.shape, 0.02) if "input" in suffix else numbers / 100
        else:
            tensors[suffix] = ((numbers - 0.5) * (100 if spec.dtype.itemsize == 1 else 1)).to(spec.dtype)
    return tensors


@pytest.mark.parametrize("name", METHODS)
def test_together_or_one_by_one(name):
    cls, section = METHODS[name]
    outputs = []
    for ops in (OpTable(), OpTable(quantized_experts_mm=together)):
        context = ModelContext(
            ops=ops, dtype=torch.float32, device=torch.device("cpu"), quant=cls(section), max_model_len=1
        )
        experts, together.calls = Experts(context, "layers.0.mlp.experts", EXPERTS, HIDDEN, INNER), 0
        for block in (experts.gate_up, experts.down):
            block.finalize(filled(block.specs, section is ORDERED))
        x = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(4))
        ids = torch.tensor([[0, 2], [2, 0], [0, 2], [2, 0], [0, 2], [1, 0], [2, 1]])
        outputs += [experts(x, ids, torch.full((7, 2), 0.5)), experts(x[:1], ids[:1], torch.full((1, 2), 0.5))]
    assert together.calls == (0 if "static" in name else 4)
    for alone, all_at_once in zip(outputs[:2], outputs[2:], strict=True):
        assert alone.abs().max() > 1e-3
        torch.testing.assert_close(all_at_once, alone, rtol=1e-4, atol=1e-5 * alone.abs().max().item())
