"""Whole models: layers merged, experts, head and router plain, and the same tokens in any batch."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from dovetail.layers.linear import Linear
from dovetail_quant.fp8 import Fp8

ON_LOAD = ["int8", "fp8", "int8-w8a8", "fp8-w8a8"]
FP8 = torch.float8_e4m3fn
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 64]}
rng = random.Random(3)
PROMPTS = [[rng.randrange(96) for _ in range(n)] for n in (1, 7, 30, 41)]


def rounded(weight_OI: Tensor, method: str) -> Tensor:
    """What the weight becomes: float64 arithmetic, one scale per output."""
    largest = 127.0 if method.startswith("int8") else 448.0
    scale_O1 = weight_OI.double().abs().amax(1, keepdim=True).float().double() / largest
    values = weight_OI.double() / scale_O1
    values = values.round() if method.startswith("int8") else values.float().to(FP8).double()
    return (values * scale_O1).float()


def in_blocks(_: str, weight_OI: Tensor) -> dict[str, Tensor]:
    """64 × 64 blocks; those at the edges are smaller."""
    rows = []
    values = torch.empty_like(weight_OI, dtype=FP8)
    for o in range(0, len(weight_OI), 64):
        rows.append([])
        for i in range(0, weight_OI.shape[1], 64):
            block = weight_OI[o : o + 64, i : i + 64]
            scale = block.abs().max() / 448
            values[o : o + 64, i : i + 64] = (block / scale).to(FP8)
            rows[-1].append(scale)
    return {"weight": values, "weight_scale_inv": torch.tensor(rows)}


def from_blocks(layer: str, weight_OI: Tensor) -> dict[str, Tensor]:
    """The plain weight that the blocks stand for."""
    stored = in_blocks(layer, weight_OI)
    each_O, each_I = (torch.arange(size) // 64 for size in weight_OI.shape)
    return {"weight": stored["weight"].float() * stored["weight_scale_inv"][each_O][:, each_I]}


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("method", ["int8", "fp8"])
def test_weight_only_equals_plain_weights_of_the_same_values(checkpoints, generate, kind, method):
    """Every projection is quantized, experts one by one; output head, router, norms and biases are not."""
    expected = generate(checkpoints.write(kind, lambda _, w: {"weight": rounded(w, method)}), PROMPTS)
    actual = generate(checkpoints.write(kind), PROMPTS, method)
    assert [c.token_ids for c in actual] == [c.token_ids for c in expected]


def mean_difference(left, right):
    pairs = zip(left.prompt_logprobs[1:], right.prompt_logprobs[1:], strict=True)
    differences = [abs(a.logprob - b.logprob) for a, b in pairs]
    return sum(differences) / len(differences)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("method", [*ON_LOAD, "blocks"])
def test_log_probabilities_stay_close(checkpoints, generate, kind, method):
    """Those of the prompt, to those of the unrounded model; closer with int8 than with fp8, which has fewer digits."""
    options = {"max_tokens": 1, "prompt_logprobs": 0}
    plain = from_blocks if method == "blocks" else None
    expected = generate(checkpoints.write(kind, plain), PROMPTS[3:], **options)[0]
    if method == "blocks":
        path = checkpoints.write(kind, in_blocks, quantization_config=BLOCKS)
        actual = generate(path, PROMPTS[3:], **options)[0]
    else:
        actual = generate(checkpoints.write(kind), PROMPTS[3:], method, **options)[0]
    difference = mean_difference(actual, expected)
    assert 1e-4 < difference < (0.08 if method.startswith("int8") else 0.3)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("method", [*ON_LOAD, "blocks"])
def test_tokens_are_the_same_in_any_batch(checkpoints, generate, kind, method):
    """And in any chunking, bit for bit: log-probabilities too."""
    quantized = method == "blocks"
    path = checkpoints.write(kind, in_blocks, quantization_config=BLOCKS) if quantized else checkpoints.write(kind)
    asked = None if quantized else method
    together = generate(path, PROMPTS, asked, dtype="bfloat16", prompt_logprobs=0)
    alone = generate(path, PROMPTS[3:], asked, dtype="bfloat16", prompt_logprobs=0, max_num_batched_tokens=64)
    assert together[3].token_ids == alone[0].token_ids
    assert together[3].prompt_logprobs == alone[0].prompt_logprobs


def per_tensor(_: str, weight_OI: Tensor) -> dict[str, Tensor]:
    """One scale."""
    scale = weight_OI.abs().max() / 448
    return {"weight": (weight_OI / scale).to(FP8), "weight_scale": scale}


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("store", [in_blocks, per_tensor])
def test_rows_of_published_formats_quantized_as_they_are_computed(checkpoints, generate, monkeypatch, kind, store):
    """The same bits as if they were quantized when they are read."""
    section = BLOCKS if store is in_blocks else {"quant_method": "fp8", "activation_scheme": "dynamic"}
    path = checkpoints.write(kind, store, quantization_config=section)
    forms, forward_rows = [], Linear.forward_rows
    monkeypatch.setattr(Linear, "forward_rows", lambda self, x: (forms.append(type(x)), forward_rows(self, x))[1])
    at_once = generate(path, PROMPTS, dtype="bfloat16", prompt_logprobs=0)
    assert tuple in forms
    forms.clear()
    monkeypatch.setattr(Fp8, "row_product", lambda self: None)
    later = generate(path, PROMPTS, dtype="bfloat16", prompt_logprobs=0)
    assert tuple not in forms
    for got, expected in zip(at_once, later, strict=True):
        assert (got.token_ids, got.prompt_logprobs) == (expected.token_ids, expected.prompt_logprobs)
