"""Reference operations against the most naive float64 computation, written with explicit loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dovetail.contracts.ops import OpTable
from dovetail.errors import PluginLoadError
from dovetail.ops import reference
from dovetail.ops.sampling import SamplingTensors

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def rand(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_matches(actual, expected, dtype):
    assert actual.dtype == dtype
    expected = torch.as_tensor(expected, dtype=torch.float64).reshape(actual.shape)
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def naive_rms_norm(row, weight, eps):
    mean_square = sum(v * v for v in row) / len(row)
    return [v / math.sqrt(mean_square + eps) * w for v, w in zip(row, weight, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(3, 16), (1, 1), (0, 8)])
def test_rms_norm(dtype, tokens, width):
    x, weight = rand(tokens, width, dtype=dtype), rand(width, dtype=dtype, seed=1)
    expected = [naive_rms_norm(row, weight.double().tolist(), 1e-5) for row in x.double().tolist()]
    assert_matches(reference.rms_norm(x, weight, 1e-5), expected, dtype)


def test_rms_norm_of_large_half_precision_does_not_overflow():
    x = torch.full((2, 64), 3e4, dtype=torch.float16)
    assert reference.rms_norm(x, torch.ones(64, dtype=torch.float16), 1e-6).float().sub(1).abs().max() < 1e-3


def test_rms_norm_normalises_the_last_dimension_of_any_shape():
    x, weight = rand(2, 3, 8), rand(8)
    torch.testing.assert_close(
        reference.rms_norm(x, weight, 1e-6), reference.rms_norm(x.reshape(6, 8), weight, 1e-6).reshape(2, 3, 8)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(dtype):
    x, residual, weight = rand(4, 8, dtype=dtype), rand(4, 8, dtype=dtype, seed=1), rand(8, dtype=dtype, seed=2)
    normed, total = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    expected = [naive_rms_norm(row, weight.double().tolist(), 1e-6) for row in total.double().tolist()]
    assert_matches(normed, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_rotary(dtype, rotary_dim):
    tokens, head_size, half = 5, 8, rotary_dim // 2
    positions = torch.tensor([0, 3, 1, 9, 9])
    angle = torch.arange(10).double().unsqueeze(1) / 10 ** torch.arange(half).double()
    cos_sin = torch.cat([angle.cos(), angle.sin()], dim=-1).float()
    q, k = rand(tokens, 4, head_size, dtype=dtype), rand(tokens, 2, head_size, dtype=dtype, seed=1)
    for x, rotated in zip((q, k), reference.rotary(q, k, positions, cos_sin), strict=True):
        expected = x.double().clone()
        for t in range(tokens):
            for h in range(x.shape[1]):
                for i in range(half):
                    a, b = x[t, h, i].double(), x[t, h, i + half].double()
                    cos, sin = cos_sin[positions[t], i].double(), cos_sin[positions[t], i + half].double()
                    expected[t, h, i] = a * cos - b * sin
                    expected[t, h, i + half] = b * cos + a * sin
        assert_matches(rotated, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(dtype):
    x = rand(3, 10, dtype=dtype)
    expected = [[g / (1 + math.exp(-g)) * u for g, u in zip(r[:5], r[5:], strict=True)] for r in x.double().tolist()]
    assert_matches(reference.silu_and_mul(x), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_tanh_and_mul(dtype):
    x = rand(3, 10, dtype=dtype)

    def gelu(g):
        return 0.5 * g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))

    expected = [[gelu(g) * u for g, u in zip(row[:5], row[5:], strict=True)] for row in x.double().tolist()]
    assert_matches(reference.gelu_tanh_and_mul(x), expected, dtype)


def test_embedding_gathers_rows():
    table = rand(7, 3)
    assert torch.equal(reference.embedding(torch.tensor([6, 0, 6]), table), torch.stack([table[6], table[0], table[6]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(dtype, bias):
    x, weight = rand(3, 6, dtype=dtype), rand(4, 6, dtype=dtype, seed=1)
    bias_O = rand(4, dtype=dtype, seed=2) if bias else None
    offsets = bias_O.tolist() if bias else [0.0] * 4
    outputs = list(zip(weight.tolist(), offsets, strict=True))
    expected = [[dot(row, w) + offset for w, offset in outputs] for row in x.tolist()]
    assert_matches(reference.linear(x, reference.linear_pack(weight), bias_O), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_silu_and_mul(dtype):
    x, weight, bias_O = rand(3, 6, dtype=dtype), rand(4, 6, dtype=dtype, seed=1), rand(4, dtype=dtype, seed=2)
    gate_up = [[dot(row, w) + b for w, b in zip(weight.tolist(), bias_O.tolist(), strict=True)] for row in x.tolist()]
    expected = [[g / (1 + math.exp(-g)) * u for g, u in zip(row[:2], row[2:], strict=True)] for row in gate_up]
    assert_matches(reference.linear_silu_and_mul(x, weight, bias_O), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("per_tensor", [True, False])
def test_scaled_mm(dtype, per_tensor):
    x, weight = rand(3, 40).mul(30).to(dtype), rand(5, 40, seed=1).mul(30).to(dtype)
    x_scale = rand(*((1, 1) if per_tensor else (3, 1)), seed=2).abs()
    weight_scale = rand(*((1, 1) if per_tensor else (5, 1)), seed=3).abs()
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for t in range(3):
        for o in range(5):
            for i in range(40):
                a = x[t, i].double() * x_scale[0 if per_tensor else t, 0]
                expected[t, o] += a * weight[o, i].double() * weight_scale[0 if per_tensor else o, 0]
    result = reference.scaled_mm(x, weight, x_scale, weight_scale, torch.float32)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-3)
    assert reference.scaled_mm(x, weight, x_scale, weight_scale, torch.bfloat16).dtype == torch.bfloat16
    assert reference.scaled_mm_pack(weight) is weight


CODES = [torch.int8, torch.float8_e4m3fn]


def quantized(rows, inputs, code, seed=0):
    return rand(rows, inputs, seed=seed).mul(30).to(code)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(("inputs", "group"), [(12, None), (12, 4), (11, 4)])
def test_weight_only_mm(dtype, code, inputs, group):
    outputs, groups = 5, 1 if group is None else 3
    x, bias = rand(3, inputs, dtype=dtype), rand(outputs, dtype=dtype, seed=2)
    weight, scale = quantized(outputs, inputs, code), rand(outputs, groups, seed=1).abs() / 30
    expected = bias.double().repeat(3, 1)
    for t in range(3):
        for o in range(outputs):
            for i in range(inputs):
                factor = scale[o, i // (group or inputs)].double()
                expected[t, o] += x[t, i].double() * weight[o, i].double() * factor
    packed = reference.weight_only_pack(weight, scale, group)
    assert_matches(reference.weight_only_mm(x, packed, bias), expected, dtype)
    assert_matches(reference.weight_only_mm(x, packed), expected - bias.double(), dtype)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("inputs", [12, 11])
def test_block_scaled_mm(code, inputs):
    outputs, group, groups = 5, 4, 3
    x, x_scale = quantized(3, inputs, code, seed=3), rand(3, groups, seed=4).abs() / 30
    weight, scale = quantized(outputs, inputs, code), rand(outputs, groups, seed=1).abs() / 30
    expected = torch.zeros(3, outputs, dtype=torch.float64)
    for t in range(3):
        for o in range(outputs):
            for i in range(inputs):
                a, b = x[t, i].double() * x_scale[t, i // group], weight[o, i].double() * scale[o, i // group]
                expected[t, o] += a * b
    packed = reference.block_scaled_pack(weight, scale, group)
    assert_matches(reference.block_scaled_mm(x, packed, x_scale, torch.float32), expected, torch.float32)
    assert reference.block_scaled_mm(x, packed, x_scale, torch.bfloat16).dtype == torch.bfloat16


def nearest(value, choices):
    """The choice nearest to a number; of two, that with the even last digit, which comes first in each pair here."""
    return min(choices, key=lambda choice: (abs(choice[0] - value), choice[1] % 2))[0]


E4M3 = [(m * 2.0**-9, m) for m in range(8)]
E4M3 += [((8 + m) * 2.0 ** (e - 10), m) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
E4M3 += [(-value, m) for value, m in E4M3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(("inputs", "group"), [(12, None), (12, 4), (11, 4)])
def test_quantize_rows(dtype, code, inputs, group):
    x = rand(3, inputs, dtype=dtype) * torch.tensor([[1e-3], [1.0], [1e3]], dtype=dtype)
    values, scales = reference.quantize_rows(x, code, group)
    assert (values.dtype, scales.dtype, scales.shape) == (code, torch.float32, (3, 1 if group is None else 3))
    largest, choices = (127, [(float(i), i) for i in range(-127, 128)]) if code == torch.int8 else (448, E4M3)
    for t in range(3):
        for first in range(0, inputs, group or inputs):
            part = x[t, first : first + (group or inputs)].float()
            scale = scales[t, first // (group or inputs)]
            assert scale.item() == (part.abs().max() / largest).item()
            expected = [nearest(value, choices) for value in (part / scale).tolist()]
            assert values[t, first : first + len(part)].tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("group", [None, 4])
def test_what_quantizes_its_result(dtype, code, group):
    """The naive norm and activation, rounded to the dtype, within a step of the 8 bits."""
    x, residual = rand(3, 22, dtype=dtype), rand(3, 22, dtype=dtype, seed=1)
    weight = rand(22, dtype=dtype, seed=2)
    values, scales, total = reference.add_rms_norm_quantize(x, residual, weight, 1e-5, code, group)
    assert torch.equal(total, x + residual)
    normed = [naive_rms_norm(row, weight.tolist(), 1e-5) for row in total.tolist()]
    gated = [[g / (1 + math.exp(-g)) * u for g, u in zip(row[:11], row[11:], strict=True)] for row in x.tolist()]
    for (codes, scale), rows in (((values, scales), normed), (reference.silu_and_mul_quantize(x, code, group), gated)):
        expected = torch.tensor(rows, dtype=torch.float64)
        assert codes.shape == expected.shape
        wide = codes.double() * scale.double().repeat_interleave(group or expected.shape[1], 1)[:, : expected.shape[1]]
        step = 1 / 254 if code == torch.int8 else 1 / 16
        error = (wide - expected).abs() / expected.abs().amax(1, keepdim=True)
        assert error.max() <= step + TOLERANCE[dtype]


@pytest.mark.parametrize("code", CODES)
def test_quantize_rows_of_zeros_and_of_what_is_not_finite(code):
    x = torch.zeros(3, 8)
    x[1, 3], x[2, 5] = torch.inf, torch.nan
    values, scales = reference.quantize_rows(x, code)
    assert values[0].float().abs().max() == 0
    assert scales[0].isfinite().all()
    assert not scales[1:].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero_points", [True, False])
def test_w4a16_mm(dtype, zero_points):
    group, inputs, outputs = 4, 12, 5
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 16, (outputs, inputs), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (outputs, inputs // group), generator=generator) if zero_points else None
    scales, x = rand(outputs, inputs // group, dtype=dtype).abs(), rand(3, inputs, dtype=dtype, seed=1)
    packed = [[row[j] + 16 * row[j + 1] for j in range(0, inputs, 2)] for row in values.tolist()]
    packed = torch.tensor(packed, dtype=torch.uint8)
    expected = torch.zeros(3, outputs, dtype=torch.float64)
    for t in range(3):
        for o in range(outputs):
            for i in range(inputs):
                zero = zeros[o, i // group].item() if zero_points else 8
                weight = (values[o, i].item() - zero) * scales[o, i // group].double()
                expected[t, o] += x[t, i].double() * weight
    assert_matches(reference.w4a16_mm(x, packed, scales, zeros, group), expected, dtype)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_choose_experts(dtype, normalize):
    logits = rand(5, 7, dtype=dtype)
    ids, weights = reference.choose_experts(logits, 3, normalize)
    assert weights.dtype == torch.float32
    for row, chosen, given in zip(logits.tolist(), ids.tolist(), weights.tolist(), strict=True):
        assert chosen == sorted(range(7), key=lambda e: -row[e])[:3]
        powers = [math.exp(logit) for logit in row]
        total = sum(powers[e] for e in chosen) if normalize else sum(powers)
        assert given == pytest.approx([powers[e] / total for e in chosen], rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_moe_experts(dtype):
    tokens, width, inner, experts = 6, 4, 3, 4
    x = rand(tokens, width, dtype=dtype)
    gate_up = rand(experts, 2 * inner, width, dtype=dtype, seed=1)
    down = rand(experts, width, inner, dtype=dtype, seed=2)
    ids = torch.tensor([[0, 1], [3, 2], [1, 1], [-1, 0], [0, 3], [-1, -1]])
    weights = rand(tokens, 2, seed=3)
    expected = torch.zeros(tokens, width, dtype=torch.float64)
    for t in range(tokens):
        for a in range(2):
            expert = ids[t, a].item()
            if expert < 0:
                continue
            hidden = [dot(row, x[t].tolist()) for row in gate_up[expert].tolist()]
            inside = [g / (1 + math.exp(-g)) * u for g, u in zip(hidden[:inner], hidden[inner:], strict=True)]
            for d in range(width):
                expected[t, d] += weights[t, a].double() * dot(down[expert, d].tolist(), inside)
    result = reference.moe_experts(x, reference.experts_pack(gate_up), reference.experts_pack(down), ids, weights)
    assert result.dtype == dtype
    # bfloat16 rounds after each of three products
    tolerance = (3 if dtype == torch.bfloat16 else 1) * TOLERANCE[dtype]
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
    assert reference.moe_experts(x[:0], gate_up, down, ids[:0], weights[:0]).shape == (0, width)


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
def test_write_kv_places_each_token(kv_dtype):
    k_cache, v_cache = torch.zeros(4, 3, 2, 5, dtype=kv_dtype), torch.zeros(4, 3, 2, 5, dtype=kv_dtype)
    k, v = rand(3, 2, 5), rand(3, 2, 5, seed=1)
    reference.write_kv(k, v, k_cache, v_cache, torch.tensor([3 * 3 + 2, 1 * 3, 1 * 3 + 1]))
    for t, (block, offset) in enumerate([(3, 2), (1, 0), (1, 1)]):
        assert torch.equal(k_cache[block, offset], k[t].to(kv_dtype))
        assert torch.equal(v_cache[block, offset], v[t].to(kv_dtype))
    assert k_cache.count_nonzero() == k.numel()


def test_write_kv_accepts_strided_caches():
    cache = torch.zeros(2, 4, 2, 3, 5)
    k_cache, v_cache = (c.transpose(1, 2) for c in cache.unbind(0))
    k, v = rand(1, 2, 5), rand(1, 2, 5, seed=1)
    reference.write_kv(k, v, k_cache, v_cache, torch.tensor([2 * 3 + 1]))
    assert torch.equal(cache[0, 2, :, 1], k[0])
    assert torch.equal(cache[1, 2, :, 1], v[0])


def naive_attention(q, keys, values, scale, window, soft_cap):
    """One query ``[K]`` over the keys up to and including its own, in float64 with Python floats."""
    start = 0 if window is None else max(0, len(keys) - window)
    scores = []
    for key in keys[start:]:
        score = dot(q, key) * scale
        scores.append(score if soft_cap is None else soft_cap * math.tanh(score / soft_cap))
    weights = [math.exp(score - max(scores)) for score in scores]
    total = sum(weights)
    return [dot(weights, [v[i] for v in values[start:]]) / total for i in range(len(q))]


BATCHES = {
    "decode": [(1, 7), (1, 1), (1, 12)],
    "prefill": [(5, 5), (9, 9)],
    "mixed chunks and drafts": [(1, 10), (4, 11), (6, 6), (3, 3)],
    "padding requests": [(2, 9), (0, 0), (1, 4), (0, 0)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (4, None), (1, 1.5), (100, 2.0)])
def test_paged_attention(dtype, batch, heads, kv_heads, window, soft_cap):
    head_size, block_size, padding_tokens = 3, 4, 2
    max_blocks = 4
    num_blocks = 1 + max_blocks * len(batch)
    k_cache = torch.full((num_blocks, block_size, kv_heads, head_size), torch.nan, dtype=dtype)
    v_cache = k_cache.clone()
    order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(1)) + 1
    block_table = torch.zeros(len(batch), max_blocks, dtype=torch.int32)
    tokens = sum(count for count, _ in batch)
    q = rand(tokens + padding_tokens, heads, head_size, dtype=dtype)
    expected = torch.zeros(tokens + padding_tokens, heads, head_size, dtype=torch.float64)
    scale, row = 0.37, 0
    for r, (count, length) in enumerate(batch):
        block_table[r] = order[r * max_blocks : (r + 1) * max_blocks]
        keys, values = (rand(length, kv_heads, head_size, dtype=dtype, seed=10 * r + s) for s in (1, 2))
        first_visible = 0 if window is None else max(0, length - count - window + 1)
        for position in range(length):
            block, offset = block_table[r, position // block_size], position % block_size
            if position // block_size < first_visible // block_size:
                block_table[r, position // block_size] = 0  # the page slid out of the window
            else:
                k_cache[block, offset], v_cache[block, offset] = keys[position], values[position]
        for t in range(count):
            seen = length - count + t + 1
            for h in range(heads):
                kv = h // (heads // kv_heads)
                seen_k, seen_v = keys[:seen, kv].tolist(), values[:seen, kv].tolist()
                attended = naive_attention(q[row, h].tolist(), seen_k, seen_v, scale, window, soft_cap)
                expected[row, h] = torch.tensor(attended, dtype=torch.float64)
            row += 1
    starts = torch.tensor([0, *torch.tensor([count for count, _ in batch]).cumsum(0)], dtype=torch.int32)
    lengths = torch.tensor([length for _, length in batch], dtype=torch.int32)
    out = reference.paged_attention(q, k_cache, v_cache, block_table, starts, lengths, scale, window, soft_cap)
    assert out.shape == (tokens + padding_tokens, heads * head_size)
    assert_matches(out, expected.flatten(1), dtype)


def test_sample_residual_draws_what_is_left():
    p, q = torch.tensor([0.1, 0.5, 0.0, 0.4]), torch.tensor([0.4, 0.1, 0.3, 0.2])
    rows = 20000
    params = SamplingTensors(
        **{name: torch.empty(0) for name in ("temperature_S", "top_k_S", "top_p_S", "min_p_S")},
        seeds_S=torch.arange(rows),
        positions_S=torch.zeros(rows, dtype=torch.int64),
        all_greedy=False,
        any_filter=False,
    )
    tokens = reference.sample_residual(p.expand(rows, 4), q.expand(rows, 4), params)
    shares = tokens.bincount(minlength=4).double() / rows
    torch.testing.assert_close(shares, torch.tensor([0, 2 / 3, 0, 1 / 3], dtype=torch.float64), rtol=0, atol=0.015)
    nothing_left = reference.sample_residual(p.expand(rows, 4), p.expand(rows, 4), params)
    shares = nothing_left.bincount(minlength=4).double() / rows
    torch.testing.assert_close(shares, p.double(), rtol=0, atol=0.015)


def test_penalize():
    logits, factors = rand(4, 9), torch.tensor([[1.0, 0.0, 0.0], [1.3, 0.5, -0.2], [0.8, 0.0, 1.5]])
    logits[2, 4] = -math.inf
    counts, in_prompt = (3 * rand(3, 9, seed=1)).clamp(min=0).to(torch.int32), rand(3, 9, seed=2) > 0.5
    expected = logits.double()
    for row, slot in ((3, 1), (2, 2), (0, 0)):
        repetition, frequency, presence = factors[slot].tolist()
        for v in range(9):
            count = int(counts[slot, v])
            if count or in_prompt[slot, v]:
                expected[row, v] *= repetition if expected[row, v] < 0 else 1 / repetition
            expected[row, v] -= frequency * count + presence * (count > 0)
    reference.penalize(logits, torch.tensor([3, 2, 0]), torch.tensor([1, 2, 0]), factors, counts, in_prompt)
    assert_matches(logits, expected, torch.float32)


@pytest.mark.parametrize("k", [0, 1, 4, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_top_logprobs(dtype, k):
    logits = (2 * rand(6, 9, dtype=dtype)).round()  # with ties
    logits[0, 3:] = -math.inf
    logits[1] = logits[1].abs() * -0.0
    logits[1, 4] = 0.0
    tokens = torch.tensor([2, 8, 0, 3, 5, 7])
    columns = reference.top_logprobs(logits, tokens, k)
    assert [column.dtype for column in columns] == [torch.float32, torch.int64, torch.int64, torch.float32]
    for row, token, *got in zip(logits.tolist(), tokens.tolist(), *(c.tolist() for c in columns), strict=True):
        shift = math.log(sum(math.exp(logit) for logit in row))
        best = sorted(range(9), key=lambda v: (-row[v], v))[:k]
        assert got[0] == pytest.approx(row[token] - shift, rel=1e-6, abs=1e-6)
        assert got[1] == 1 + sum(logit > row[token] for logit in row)
        assert got[2] == best
        assert got[3] == pytest.approx([row[v] - shift for v in best], rel=1e-6, abs=1e-6)


def test_op_table_composes_of_its_own_operations():
    x, weight = rand(2, 4), rand(6, 4, seed=1)

    def doubled(x_TI, packed, bias_O=None):
        return 2 * reference.linear(x_TI, packed, bias_O)

    expected = reference.silu_and_mul(doubled(x, weight))
    table = OpTable.resolve({"linear": doubled}, "a platform")
    assert torch.equal(table.linear_silu_and_mul(x, weight), expected)
    assert torch.equal(replace(OpTable(), linear=doubled).linear_silu_and_mul(x, weight), expected)
    assert OpTable(linear_silu_and_mul=max).linear_silu_and_mul is max


def test_op_table_quantizes_what_its_own_operations_computed():
    x, weight = rand(3, 8), rand(8, seed=1)
    table = OpTable.resolve(
        {
            "add_rms_norm": lambda x_TD, residual_TD, weight_D, eps: (x_TD, residual_TD),
            "silu_and_mul": lambda x_T2F: x_T2F[:, :4],
            "quantize_rows": lambda x_TI, dtype, group_size=None: (x_TI.to(dtype), group_size),
        },
        "a platform",
    )
    values, group, total = table.add_rms_norm_quantize(3 * x, x, weight, 1e-5, torch.int8, 4)
    assert torch.equal(values, (3 * x).to(torch.int8))
    assert group == 4
    assert total is x
    values, group = table.silu_and_mul_quantize(5 * x, torch.int8)
    assert torch.equal(values, (5 * x[:, :4]).to(torch.int8))
    assert group is None


def test_op_table_takes_overrides_and_refuses_unknown_names():
    table = OpTable.resolve({"linear": max}, "a platform")
    assert table.linear is max
    assert table.rms_norm is reference.rms_norm
    with pytest.raises(PluginLoadError, match="a platform overrides unknown operations \\['lineal'\\]"):
        OpTable.resolve({"lineal": max}, "a platform")
