"""Operations with one realistic mistake each: the suite catches every one, in the scenario that is about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.ops import reference
from dovetail.plugins.manifest import PlatformManifest
from dovetail.testing.conformance import OpsSuite, scenarios, unregistered
from dovetail.testing.platforms import ReferencePlatform

MANIFEST = PlatformManifest(
    name="broken", summary="For tests.", device_type="cpu", dtypes=("float32", "bfloat16"), attention=("reference",)
)


def packed_view(x: Tensor) -> Tensor:
    """What code sees that takes every tensor for contiguous."""
    strides = torch.empty(x.shape).stride()
    return torch.as_strided(x, x.shape, strides, x.storage_offset())


def eps_outside_of_the_root(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide / (wide.square().mean(-1, keepdim=True).sqrt() + eps) * weight.float()).to(x.dtype)


def norm_in_low_precision(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = x.bfloat16(), weight.bfloat16()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def norm_of_contiguous_rows(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return reference.rms_norm(packed_view(x), weight, eps)


def norm_over_two_dimensions(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    flat = reference.rms_norm(x.flatten(1), weight.repeat(x.flatten(1).shape[1] // len(weight)), eps)
    return flat.view(x.shape)


def add_in_place(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    residual.add_(x)
    return reference.rms_norm(residual, weight, eps), residual


def norm_without_residual(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return reference.rms_norm(x, weight, eps), x + residual


def gate_behind(x: Tensor) -> Tensor:
    return reference.silu_and_mul(x.roll(x.shape[-1] // 2, -1))


def gelu_with_erf(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return (F.gelu(gate) * up).to(x.dtype)


def silu_that_overflows(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return (gate * gate.exp() / (1 + gate.exp()) * up).to(x.dtype)


def silu_that_swallows_nan(x: Tensor) -> Tensor:
    return reference.silu_and_mul(x).nan_to_num()


def rotary_of_neighbours(q: Tensor, k: Tensor, positions: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = table[positions].unsqueeze(1).chunk(2, dim=-1)

    def turn(x: Tensor) -> Tensor:
        out, size = x.clone(), table.shape[1]
        even, odd = x[..., 0:size:2], x[..., 1:size:2]
        out[..., 0:size:2], out[..., 1:size:2] = even * cos - odd * sin, odd * cos + even * sin
        return out

    return turn(q), turn(k)


def rotary_by_row(q: Tensor, k: Tensor, positions: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    return reference.rotary(q, k, torch.arange(len(positions)) % len(table), table)


def rotary_over_the_neighbour(q: Tensor, k: Tensor, positions: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    turned = reference.rotary(q, k, positions, table)
    heads, size = k.shape[1:]
    behind = torch.as_strided(k, (len(k), 1, size), k.stride(), k.storage_offset() + heads * size)
    behind.copy_(turned[1][:, :1])  # one head too many is written
    return turned


def embedding_from_one(ids: Tensor, table: Tensor) -> Tensor:
    return F.embedding((ids - 1).clamp(min=0), table)


def linear_without_bias(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, packed)


def linear_summed_in_low_precision(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    total = torch.zeros(len(x), len(packed), dtype=torch.bfloat16)
    for i in range(0, x.shape[1], 16):
        total += F.linear(x[:, i : i + 16].bfloat16(), packed[:, i : i + 16].bfloat16())
    return (total if bias is None else total + bias.bfloat16()).to(x.dtype)


def linear_and_mul_alone(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    gate, up = F.linear(x, packed, bias).chunk(2, -1)
    return gate * up


def linear_of_contiguous_rows(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(packed_view(x), packed, bias)


def quantize_downwards(x: Tensor, dtype: torch.dtype, group: int | None = None) -> tuple[Tensor, Tensor]:
    scales = reference.quantize_rows(x, dtype, group)[1]
    wide = x.float() / scales.repeat_interleave(group or x.shape[1], dim=1)[:, : x.shape[1]]
    return (wide.trunc() if dtype == torch.int8 else wide * 0.97).to(dtype), scales


def quantize_per_tensor(x: Tensor, dtype: torch.dtype, group: int | None = None) -> tuple[Tensor, Tensor]:
    scales = reference.quantize_rows(x, dtype, group)[1]
    largest = scales.amax().expand_as(scales) if scales.numel() else scales
    wide = x.float() / largest.repeat_interleave(group or x.shape[1], dim=1)[:, : x.shape[1]]
    return (wide.round() if dtype == torch.int8 else wide).to(dtype), largest.clone()


def quantize_zeros_to_nan(x: Tensor, dtype: torch.dtype, group: int | None = None) -> tuple[Tensor, Tensor]:
    values, scales = reference.quantize_rows(x, dtype, group)
    return values, torch.where(scales < 1e-10, torch.nan, scales)


def quantize_hiding_nan(x: Tensor, dtype: torch.dtype, group: int | None = None) -> tuple[Tensor, Tensor]:
    return reference.quantize_rows(x.nan_to_num(), dtype, group)


def norm_quantized_without_its_weight(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, group: int | None = None
) -> tuple[Tensor, ...]:
    return reference.add_rms_norm_quantize(x, residual, torch.ones_like(weight), eps, dtype, group)


def norm_quantized_per_tensor(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, group: int | None = None
) -> tuple[Tensor, ...]:
    normed, total = reference.add_rms_norm(x, residual, weight, eps)
    return *quantize_per_tensor(normed, dtype, group), total


def norm_quantized_of_the_residual(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, group: int | None = None
) -> tuple[Tensor, ...]:
    values, scales, _ = reference.add_rms_norm_quantize(x, residual, weight, eps, dtype, group)
    return values, scales, residual


def gate_quantized_in_rows(x: Tensor, dtype: torch.dtype, group: int | None = None) -> tuple[Tensor, Tensor]:
    values, scales = reference.silu_and_mul_quantize(x, dtype)
    return values, scales.expand(-1, -(-values.shape[1] // (group or values.shape[1])))


def gate_quantized_alone(x: Tensor, dtype: torch.dtype, group: int | None = None) -> tuple[Tensor, Tensor]:
    return reference.quantize_rows(F.silu(x.chunk(2, -1)[0]), dtype, group)


def weight_only_with_first_scales(x: Tensor, packed: Any, bias: Tensor | None = None) -> Tensor:
    first = packed.scale_OG[:, :1].expand_as(packed.scale_OG)
    return reference.weight_only_mm(x, packed._replace(scale_OG=first), bias)


def weight_only_scaling_the_bias(x: Tensor, packed: Any, bias: Tensor | None = None) -> Tensor:
    scaled = None if bias is None else (bias.float() * packed.scale_OG[:, 0]).to(bias.dtype)
    return reference.weight_only_mm(x, packed, scaled)


def scaled_in_sixteen_bits(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, out: torch.dtype
) -> Tensor:
    product = (x.float() @ weight.float().t()).clamp(-32768, 32767)
    return (product * x_scale * weight_scale.t()).to(out)


def scaled_by_the_first_token(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, out: torch.dtype
) -> Tensor:
    return reference.scaled_mm(x, weight, x_scale[:1], weight_scale, out)


def scaled_after_the_sum(x: Tensor, packed: Any, x_scale: Tensor, out: torch.dtype) -> Tensor:
    product = x.float() @ packed.weight_OI.float().t()
    return (product * x_scale.mean(1, keepdim=True) * packed.scale_OG.mean(1)).to(out)


def quantized_experts_in_turn(x: Tensor, packed: Any, starts: Tensor, *rest: Any) -> Tensor:
    empty = (starts[1:] == starts[:-1]).cumsum(0) > 0
    shifted = starts.clone()
    shifted[1:-1] = torch.where(empty[:-1], starts[1:-1] // 2, starts[1:-1])
    return reference.quantized_experts_mm(x, packed, shifted, *rest)


def quantized_experts_without_zero_points(
    weight: Tensor, scale: Tensor, zero: Tensor | None = None, group: int | None = None
) -> Any:
    return reference.quantized_experts_pack(weight, scale, None, group)


def high_half_first(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int) -> Tensor:
    return reference.w4a16_mm(x, (packed >> 4) | (packed << 4), scales, zeros, group)


def zero_point_of_seven_and_a_half(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int
) -> Tensor:
    return reference.w4a16_mm(x, packed, scales, torch.full_like(scales, 7.5) if zeros is None else zeros, group)


def last_expert_for_nobody(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return reference.moe_experts(x, gate_up, down, ids % len(gate_up), weights)


def experts_of_equal_weight(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return reference.moe_experts(x, gate_up, down, ids, torch.ones_like(weights) / weights.shape[1])


def first_expert_alone(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return reference.moe_experts(x, gate_up, down, ids[:, :1], weights[:, :1])


def choose_in_low_precision(logits: Tensor, active: int, normalize: bool) -> tuple[Tensor, Tensor]:
    ids, weights = reference.choose_experts(logits, active, normalize)
    return ids, weights.bfloat16().float()


def choose_the_least_probable_first(logits: Tensor, active: int, normalize: bool) -> tuple[Tensor, Tensor]:
    return tuple(out.flip(-1) for out in reference.choose_experts(logits, active, normalize))


def choose_and_always_normalize(logits: Tensor, active: int, normalize: bool) -> tuple[Tensor, Tensor]:
    return reference.choose_experts(logits, active, True)


def keys_for_values(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    reference.write_kv(k, k, k_cache, v_cache, slots)


def write_to_contiguous_pages(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    reference.write_kv(k, v, packed_view(k_cache), packed_view(v_cache), slots)


def window_one_too_wide(*given: Any) -> Tensor:
    *tensors, scale, window, cap = given
    return reference.paged_attention(*tensors, scale, window and window + 1, cap)


def cap_ignored(*given: Any) -> Tensor:
    return reference.paged_attention(*given[:8])


def last_of_the_largest(logits: Tensor, params: Any) -> Tensor:
    if not params.all_greedy:
        return reference.sample(logits, params)
    return logits.shape[1] - 1 - logits.flip(-1).argmax(-1)


def nan_is_small(logits: Tensor, params: Any) -> Tensor:
    return reference.sample(logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf), params)


def noise_by_row(logits: Tensor, params: Any) -> Tensor:
    return reference.sample(logits, replace(params, seeds_S=params.seeds_S + torch.arange(len(params.seeds_S))))


def filters_before_temperature(logits: Tensor, params: Any) -> Tensor:
    cold = replace(params, temperature_S=(params.temperature_S > 0).float())
    if params.all_greedy or not params.any_filter:
        return reference.sample(logits, params)
    from dovetail.ops.sampling import filter_logits

    kept = filter_logits(logits, cold) > -torch.inf
    plain = replace(params, top_k_S=params.top_k_S * 0, top_p_S=params.top_p_S * 0 + 1, min_p_S=params.min_p_S * 0)
    return reference.sample(logits.masked_fill(~kept, -torch.inf), replace(plain, any_filter=False))


def drop_the_tied(logits: Tensor, params: Any) -> Tensor:
    kept = reference.filter_logits(logits, params)
    if not params.any_filter:
        return kept
    last = kept.masked_fill(kept == -torch.inf, torch.inf).amin(-1, keepdim=True)
    tied = kept == last
    return kept.masked_fill(tied & (tied.cumsum(-1) > 1), -torch.inf)


def filter_greedy_rows(logits: Tensor, params: Any) -> Tensor:
    return reference.filter_logits(logits, replace(params, temperature_S=params.temperature_S.clamp(min=1)))


def residual_of_nothing(probs: Tensor, drafts: Tensor, params: Any) -> Tensor:
    return reference.sample_residual((probs - drafts).clamp(min=0), torch.zeros_like(drafts), params)


def residual_with_ordinary_noise(probs: Tensor, drafts: Tensor, params: Any) -> Tensor:
    return reference.sample((probs - drafts).clamp(min=0).log(), params)


def presence_in_the_prompt(
    logits: Tensor, rows: Tensor, slots: Tensor, factors: Tensor, counts: Tensor, in_prompt: Tensor
) -> None:
    reference.penalize(logits, rows, slots, factors, counts + in_prompt.to(counts.dtype), in_prompt)


def repetition_of_the_output(
    logits: Tensor, rows: Tensor, slots: Tensor, factors: Tensor, counts: Tensor, in_prompt: Tensor
) -> None:
    reference.penalize(logits, rows, slots, factors, counts, torch.zeros_like(in_prompt))


def rank_with_equals(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, ...]:
    logprobs, _, *top = reference.top_logprobs(logits, tokens, k)
    return logprobs, (logits >= logits.gather(1, tokens.unsqueeze(1))).sum(-1), *top


def last_of_equals_first(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, ...]:
    logprobs, ranks, ids, values = reference.top_logprobs(logits.flip(1), logits.shape[1] - 1 - tokens, k)
    return logprobs, ranks, logits.shape[1] - 1 - ids, values


def logprobs_of_the_logits_alone(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, ...]:
    logprobs, ranks, ids, _ = reference.top_logprobs(logits, tokens, k)
    return logprobs, ranks, ids, logits.float().gather(1, ids)


def linear_with_one_scale(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    largest = x.abs().max() if x.numel() else torch.ones((), dtype=x.dtype)
    return F.linear(x / largest, packed, bias) * largest


MUTANTS: Mapping[Callable[..., Any], tuple[str, str]] = {
    eps_outside_of_the_root: ("rms_norm", "ops.1"),
    norm_in_low_precision: ("rms_norm", "ops.1"),
    norm_of_contiguous_rows: ("rms_norm", "ops.2"),
    norm_over_two_dimensions: ("rms_norm", "ops.2"),
    add_in_place: ("add_rms_norm", "ops.3"),
    norm_without_residual: ("add_rms_norm", "ops.3"),
    gate_behind: ("silu_and_mul", "ops.4"),
    gelu_with_erf: ("gelu_tanh_and_mul", "ops.4"),
    silu_that_overflows: ("silu_and_mul", "ops.5"),
    silu_that_swallows_nan: ("silu_and_mul", "ops.5"),
    rotary_of_neighbours: ("rotary", "ops.6"),
    rotary_by_row: ("rotary", "ops.6"),
    rotary_over_the_neighbour: ("rotary", "ops.6"),
    embedding_from_one: ("embedding", "ops.7"),
    linear_without_bias: ("linear", "ops.8"),
    linear_summed_in_low_precision: ("linear", "ops.8"),
    linear_of_contiguous_rows: ("linear", "ops.9"),
    linear_and_mul_alone: ("linear_silu_and_mul", "ops.28"),
    quantize_downwards: ("quantize_rows", "ops.10"),
    quantize_per_tensor: ("quantize_rows", "ops.10"),
    quantize_zeros_to_nan: ("quantize_rows", "ops.11"),
    quantize_hiding_nan: ("quantize_rows", "ops.11"),
    norm_quantized_without_its_weight: ("add_rms_norm_quantize", "ops.30"),
    norm_quantized_per_tensor: ("add_rms_norm_quantize", "ops.30"),
    norm_quantized_of_the_residual: ("add_rms_norm_quantize", "ops.30"),
    gate_quantized_in_rows: ("silu_and_mul_quantize", "ops.31"),
    gate_quantized_alone: ("silu_and_mul_quantize", "ops.31"),
    weight_only_with_first_scales: ("weight_only_mm", "ops.12"),
    weight_only_scaling_the_bias: ("weight_only_mm", "ops.12"),
    scaled_in_sixteen_bits: ("scaled_mm", "ops.13"),
    scaled_by_the_first_token: ("scaled_mm", "ops.13"),
    scaled_after_the_sum: ("block_scaled_mm", "ops.14"),
    high_half_first: ("w4a16_mm", "ops.15"),
    zero_point_of_seven_and_a_half: ("w4a16_mm", "ops.15"),
    last_expert_for_nobody: ("moe_experts", "ops.16"),
    experts_of_equal_weight: ("moe_experts", "ops.16"),
    first_expert_alone: ("moe_experts", "ops.16"),
    quantized_experts_in_turn: ("quantized_experts_mm", "ops.26"),
    quantized_experts_without_zero_points: ("quantized_experts_pack", "ops.26"),
    choose_in_low_precision: ("choose_experts", "ops.23"),
    choose_the_least_probable_first: ("choose_experts", "ops.23"),
    choose_and_always_normalize: ("choose_experts", "ops.23"),
    keys_for_values: ("write_kv", "ops.17"),
    write_to_contiguous_pages: ("write_kv", "ops.17"),
    window_one_too_wide: ("paged_attention", "ops.18"),
    cap_ignored: ("paged_attention", "ops.18"),
    last_of_the_largest: ("sample", "ops.19"),
    nan_is_small: ("sample", "ops.20"),
    noise_by_row: ("sample", "ops.21"),
    filters_before_temperature: ("sample", "ops.21"),
    drop_the_tied: ("filter_logits", "ops.27"),
    filter_greedy_rows: ("filter_logits", "ops.27"),
    residual_of_nothing: ("sample_residual", "ops.29"),
    residual_with_ordinary_noise: ("sample_residual", "ops.29"),
    presence_in_the_prompt: ("penalize", "ops.25"),
    repetition_of_the_output: ("penalize", "ops.25"),
    rank_with_equals: ("top_logprobs", "ops.24"),
    last_of_equals_first: ("top_logprobs", "ops.24"),
    logprobs_of_the_logits_alone: ("top_logprobs", "ops.24"),
    linear_with_one_scale: ("linear", "ops.22"),
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_caught(mutant, failing):
    operation, scenario = MUTANTS[mutant]

    class Broken(ReferencePlatform):
        def ops(self, dtype: torch.dtype) -> Mapping[str, Callable[..., Any]]:
            return {operation: mutant}

    reason = failing(OpsSuite, unregistered(Broken, MANIFEST), scenario).get(scenario, "")
    assert reason.startswith(f"{scenario}: "), reason or f"{scenario} does not notice"


def test_every_scenario_catches_something():
    assert {scenario for _, scenario in MUTANTS.values()} == {scenario.id for scenario in scenarios(OpsSuite)}
