"""The conformance suite of a platform's operations, whether it overrides them or runs the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import Platform, PlatformConfig
from dovetail.ops import reference
from dovetail.ops.sampling import SamplingTensors
from dovetail.testing.conformance.suite import TOLERANCE, Suite

F = TypeVar("F", bound=Callable[..., Any])

TOKENS = (0, 1, 2, 7, 33, 130)
WIDTHS = (1, 7, 16, 48, 100, 768)
ELEMENTWISE = 0.25
"""Factor on the tolerance of operations that round once, at the end."""
QUANTIZED = (torch.int8, torch.float8_e4m3fn)
GROUPS = (None, 32, 24)
ROWS = ((0, 64), (1, 64), (5, 100), (33, 256))
"""Rows that are quantized, and their elements."""


def covers(*names: str) -> Callable[[F], F]:
    """Note which operations a test is about."""

    def mark(function: F) -> F:
        function.operations = names  # type: ignore[attr-defined]
        return function

    return mark


def covered(suite: type[Suite]) -> frozenset[str]:
    """The operations that the tests of a suite are about."""
    return frozenset(name for member in vars(suite).values() for name in getattr(member, "operations", ()))


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Standard normal numbers on the host, rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(31 * seed + len(shape) + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def quantized(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Numbers over the whole range of a narrow dtype, on the host."""
    generator = torch.Generator().manual_seed(77 + seed)
    if dtype is torch.int8:
        return torch.randint(-127, 128, shape, generator=generator).to(torch.int8)
    return torch.randn(shape, generator=generator).mul(100).clamp(-448, 448).to(dtype)


class OpsSuite(Suite):
    """Every operation of the op table, on the platform's device, for each of its activation dtypes. Where the platform
    is not available, everything is skipped with the reason of its probe.
    """

    contract = "ops"
    kind = "platforms"

    def table(self, dtype: torch.dtype) -> OpTable:
        """The operations of an engine on this platform."""
        self.need_device(self.tested.cls)
        return OpTable.resolve(_platform(self.tested.cls).ops(dtype), self.manifest.name)

    def place(self, *tensors: Tensor) -> Any:
        """The tensors on the device, with the same strides; one alone is returned as it is."""
        device = _platform(self.tested.cls).device
        placed = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x) for x in tensors]
        return placed[0] if len(placed) == 1 else placed

    # ---- norms and activations

    @covers("rms_norm")
    @pytest.mark.parametrize("width", WIDTHS)
    def test_rms_norm(self, dtype: torch.dtype, width: int) -> None:
        """ops.1: rms_norm divides each row by its root mean square, eps added to the mean square, in float32 or
        better, then multiplies by the weight.
        """
        ops, weight = self.table(dtype), randn(width, dtype=dtype, seed=1)
        for tokens in TOKENS:
            x = randn(tokens, width, dtype=dtype) * _magnitudes(tokens, dtype)
            for eps in (1e-6, 1e-3):
                expected = reference.rms_norm(x.double(), weight.double(), eps)
                self._rows(ops.rms_norm(*self.place(x, weight), eps), expected, f"x {list(x.shape)}, eps {eps}", dtype)

    @covers("rms_norm")
    def test_rms_norm_of_heads(self, dtype: torch.dtype) -> None:
        """ops.2: rms_norm takes views with any leading dimensions, as norms of queries and keys do."""
        ops, weight = self.table(dtype), randn(40, dtype=dtype, seed=1)
        merged = randn(9, 8, 40, dtype=dtype)
        for heads in (slice(0, 5), slice(5, 8), slice(7, 8)):
            x = self.place(merged)[:, heads]
            out = ops.rms_norm(x, self.place(weight), 1e-5)
            expected = reference.rms_norm(merged[:, heads].double(), weight.double(), 1e-5)
            self._rows(out, expected, f"heads {heads} of a merged tensor", dtype)

    @covers("add_rms_norm")
    @pytest.mark.parametrize("width", WIDTHS)
    def test_add_rms_norm(self, dtype: torch.dtype, width: int) -> None:
        """ops.3: add_rms_norm returns the norm of the rounded sum, and the sum, and leaves its inputs alone."""
        ops, weight = self.table(dtype), randn(width, dtype=dtype, seed=2)
        for tokens in TOKENS:
            x, residual = (randn(tokens, width, dtype=dtype, seed=seed) for seed in (0, 1))
            placed = self.place(x, residual)
            normed, total = ops.add_rms_norm(*placed, self.place(weight), 1e-5)
            self._exact(total, x + residual, f"the sum of {list(x.shape)}")
            expected = reference.rms_norm((x + residual).double(), weight.double(), 1e-5)
            self._rows(normed, expected, f"the norm of {list(x.shape)}", dtype)
            for name, before, after in zip(("x", "residual"), (x, residual), placed, strict=True):
                self._exact(after, before, f"{name} after the call")

    @covers("silu_and_mul", "gelu_tanh_and_mul")
    @pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
    def test_gated_activations(self, dtype: torch.dtype, name: str) -> None:
        """ops.4: gated activations apply the activation to the first half and multiply by the second, in float32 or
        better.
        """
        activation, oracle = getattr(self.table(dtype), name), getattr(reference, name)
        for tokens in TOKENS:
            for width in WIDTHS:
                x = 4 * randn(tokens, 2 * width, dtype=dtype)
                self._rows(activation(self.place(x)), oracle(x.double()), f"{name} of {list(x.shape)}", dtype, floor=1)
        wide = randn(12, 200, dtype=dtype)
        out = activation(self.place(wide)[:, 50:150])
        self._rows(out, oracle(wide[:, 50:150].double()), f"{name} of columns 50 to 150", dtype, floor=1)

    @covers("silu_and_mul", "gelu_tanh_and_mul")
    @pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
    def test_extreme_gates(self, dtype: torch.dtype, name: str) -> None:
        """ops.5: gates far from 0 saturate to 0 or to themselves, without overflow, and NaN stays NaN."""
        activation, oracle = getattr(self.table(dtype), name), getattr(reference, name)
        most = min(1e30, torch.finfo(dtype).max / 8)
        gates = torch.tensor([-most, -200.0, -90.0, -20.0, 20.0, 90.0, 200.0, most], dtype=dtype)
        x = torch.stack([gates, torch.ones_like(gates)], dim=1)
        what = f"{name} of gates {gates.tolist()}"
        self._rows(activation(self.place(x)), oracle(x.double()), what, dtype, floor=1)
        poisoned = activation(self.place(torch.tensor([[torch.nan, 1.0]], dtype=dtype)))
        self.check(bool(poisoned.isnan().all()), f"{name} of a NaN gate: expected NaN, got {poisoned.tolist()}.")

    # ---- positions and embeddings

    @covers("rotary")
    @pytest.mark.parametrize(("head_size", "rotary_dim"), [(64, 64), (64, 16), (40, 24), (20, 20), (256, 256)])
    def test_rotary(self, dtype: torch.dtype, head_size: int, rotary_dim: int) -> None:
        """ops.6: rotary turns element i of the first half of the rotary dimensions with element i of the second half,
        by the token's own position, and passes the other elements unchanged.
        """
        ops, table = self.table(dtype), randn(50, rotary_dim, dtype=torch.float32, seed=3)
        for tokens in TOKENS:
            positions = (torch.arange(tokens) * 17 + 3) % 50
            merged = randn(tokens, 8, head_size, dtype=dtype)
            heads = [5, 2, 1]
            placed = self.place(merged)
            q, k, v = placed.split_with_sizes(heads, 1)
            turned = ops.rotary(q, k, *self.place(positions, table))
            parts = merged.double().split_with_sizes(heads, 1)
            expected = reference.rotary(parts[0], parts[1], positions, table)
            for name, out, want in zip("qk", turned, expected, strict=True):
                what = f"{name} of {tokens} tokens, head size {head_size}, {rotary_dim} of them turned"
                self.close(out, want, what, dtype=dtype, looser=ELEMENTWISE)
            self._exact(v, merged[:, 7:], f"values beside the turned ones, {tokens} tokens")

    @covers("embedding", "linear_pack")
    def test_embedding(self, dtype: torch.dtype) -> None:
        """ops.7: embedding returns rows of the table exactly; where it is overridden, also of a packed table."""
        ops, table = self.table(dtype), randn(150, 96, dtype=dtype)
        forms = {"plain": self.place(table)}
        if ops.embedding is not reference.embedding:
            forms["packed"] = ops.linear_pack(self.place(table))
        every_third, none = torch.arange(150)[::3], torch.tensor([], dtype=torch.int64)
        for name, form in forms.items():
            for ids in (torch.tensor([0, 149, 63, 64, 64, 5]), every_third, none):
                self._exact(ops.embedding(self.place(ids), form), table[ids], f"ids {ids.tolist()} of a {name} table")

    # ---- products

    @covers("linear", "linear_pack")
    @pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
    @pytest.mark.parametrize(("inputs", "outputs"), [(2, 1), (7, 5), (48, 63), (96, 130), (768, 64), (130, 257)])
    def test_linear(self, dtype: torch.dtype, inputs: int, outputs: int, bias: bool) -> None:
        """ops.8: linear is x @ weightᵀ + bias, summed in float32 or better, of what linear_pack made of the weight."""
        ops, weight = self.table(dtype), randn(outputs, inputs, dtype=dtype) / inputs**0.5
        bias_O = 3 * randn(outputs, dtype=dtype, seed=1) if bias else None
        packed = ops.linear_pack(self.place(weight))
        for tokens in TOKENS:
            x = randn(tokens, inputs, dtype=dtype, seed=tokens)
            expected = x.double() @ weight.double().t() + (0 if bias_O is None else bias_O.double())
            out = ops.linear(self.place(x), packed, None if bias_O is None else self.place(bias_O))
            self.close(out, expected, f"[{tokens}, {inputs}] @ [{inputs}, {outputs}]", dtype=dtype, looser=ELEMENTWISE)

    @covers("linear", "linear_pack")
    def test_linear_of_views(self, dtype: torch.dtype) -> None:
        """ops.9: linear takes slices of rows and columns, and linear_pack takes weights that are views."""
        ops, weight, x = self.table(dtype), randn(64, 30, dtype=dtype) / 8, randn(20, 100, dtype=dtype)
        packed = ops.linear_pack(self.place(weight).t())
        for rows, first in ((slice(3, 9), 8), (slice(0, 20, 3), 36), (slice(5, 6), 0)):
            expected = x[rows, first : first + 64].double() @ weight.double()
            out = ops.linear(self.place(x)[rows, first : first + 64], packed)
            self.close(out, expected, f"x[{rows}, {first}:{first + 64}]", dtype=dtype, looser=ELEMENTWISE)
        upright = randn(64, 20, dtype=dtype, seed=3)
        out = ops.linear(self.place(upright).t(), packed)
        self.close(out, upright.double().t() @ weight.double(), "a transposed x", dtype=dtype, looser=ELEMENTWISE)

    @covers("linear_silu_and_mul", "linear_pack")
    @pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
    @pytest.mark.parametrize(("inputs", "outputs"), [(2, 1), (48, 63), (96, 130), (768, 64)])
    def test_linear_silu_and_mul(self, dtype: torch.dtype, inputs: int, outputs: int, bias: bool) -> None:
        """ops.28: linear_silu_and_mul is silu_and_mul of linear, with or without rounding between them."""
        ops, weight = self.table(dtype), 2 * randn(2 * outputs, inputs, dtype=dtype) / inputs**0.5
        bias_O = randn(2 * outputs, dtype=dtype, seed=1) if bias else None
        packed = ops.linear_pack(self.place(weight))
        for tokens in TOKENS:
            x = randn(tokens, inputs, dtype=dtype, seed=tokens)
            gate_up = x.double() @ weight.double().t() + (0 if bias_O is None else bias_O.double())
            out = ops.linear_silu_and_mul(self.place(x), packed, None if bias_O is None else self.place(bias_O))
            self.close(out, reference.silu_and_mul(gate_up), f"[{tokens}, {inputs}] to {outputs} gates", dtype=dtype)

    @covers("quantize_rows")
    @pytest.mark.parametrize("group", GROUPS, ids="group {}".format)
    @pytest.mark.parametrize("narrow", QUANTIZED, ids=str)
    def test_quantize_rows(self, dtype: torch.dtype, narrow: torch.dtype, group: int | None) -> None:
        """ops.10: quantize_rows scales each row, or each group of it, so that its largest magnitude becomes the largest
        number of the dtype, and rounds to nearest.
        """
        ops = self.table(dtype)
        for tokens, inputs in ROWS:
            x = randn(tokens, inputs, dtype=dtype) * _magnitudes(tokens, dtype)
            self._quantized(ops.quantize_rows(self.place(x), narrow, group), x.double(), narrow, group)

    @covers("add_rms_norm_quantize")
    @pytest.mark.parametrize("group", GROUPS, ids="group {}".format)
    @pytest.mark.parametrize("narrow", QUANTIZED, ids=str)
    def test_add_rms_norm_quantize(self, dtype: torch.dtype, narrow: torch.dtype, group: int | None) -> None:
        """ops.30: add_rms_norm_quantize returns the norm of the rounded sum as quantize_rows does, and the sum."""
        ops = self.table(dtype)
        for tokens, width in ROWS:
            x, residual = (randn(tokens, width, dtype=dtype, seed=seed) for seed in (0, 1))
            weight = randn(width, dtype=dtype, seed=2)
            *rows, total = ops.add_rms_norm_quantize(*self.place(x, residual, weight), 1e-5, narrow, group)
            self._exact(total, x + residual, f"the sum of {list(x.shape)}")
            expected = reference.rms_norm((x + residual).double(), weight.double(), 1e-5)
            self._quantized(rows, expected, narrow, group, ELEMENTWISE * TOLERANCE[dtype])

    @covers("silu_and_mul_quantize")
    @pytest.mark.parametrize("group", GROUPS, ids="group {}".format)
    @pytest.mark.parametrize("narrow", QUANTIZED, ids=str)
    def test_silu_and_mul_quantize(self, dtype: torch.dtype, narrow: torch.dtype, group: int | None) -> None:
        """ops.31: silu_and_mul_quantize returns the gated activation as quantize_rows does."""
        ops = self.table(dtype)
        for tokens, width in ROWS:
            x = 3 * randn(tokens, 2 * width, dtype=dtype)
            rows = ops.silu_and_mul_quantize(self.place(x), narrow, group)
            expected = reference.silu_and_mul(x.double())
            self._quantized(rows, expected, narrow, group, ELEMENTWISE * TOLERANCE[dtype])

    @covers("quantize_rows")
    @pytest.mark.parametrize("narrow", QUANTIZED, ids=str)
    def test_quantize_unusual_rows(self, dtype: torch.dtype, narrow: torch.dtype) -> None:
        """ops.11: a row of zeros quantizes to zeros, and one with infinities or NaN has a scale that is not finite;
        neither touches other rows.
        """
        ops, x = self.table(dtype), randn(4, 64, dtype=dtype)
        alone = [part.cpu() for part in ops.quantize_rows(self.place(x[:1]), narrow)]
        x[1], x[2, 5], x[3, 9] = 0.0, torch.inf, torch.nan
        values, scales = (part.cpu() for part in ops.quantize_rows(self.place(x), narrow))
        self._exact(values[:1].float(), alone[0].float(), "values of the row before")
        self.check(bool((values[1].float() == 0).all()), f"a row of zeros: expected zeros, got {values[1]}.")
        self.check(bool(scales[1].isfinite().all()), f"a row of zeros: expected a finite scale, got {scales[1]}.")
        for row, bad in ((2, "infinity"), (3, "NaN")):
            self.check(not bool(scales[row].isfinite().any()), f"a row with {bad}: the scale {scales[row]} hides it.")

    @covers("weight_only_mm", "weight_only_pack")
    @pytest.mark.parametrize("group", GROUPS, ids="group {}".format)
    @pytest.mark.parametrize("narrow", QUANTIZED, ids=str)
    def test_weight_only_mm(self, dtype: torch.dtype, narrow: torch.dtype, group: int | None) -> None:
        """ops.12: weight_only_mm is x @ (weight × scale)ᵀ + bias, with a scale per output and group of inputs."""
        ops = self.table(dtype)
        for inputs, outputs in ((64, 48), (100, 37), (7, 3)):
            weight, scale = _scaled_weight(outputs, inputs, group, narrow)
            packed = ops.weight_only_pack(*self.place(weight, scale), group)
            wide = _dequantized(weight, scale, group)
            for tokens in TOKENS:
                x, bias = randn(tokens, inputs, dtype=dtype), randn(outputs, dtype=dtype, seed=5)
                what = f"[{tokens}, {inputs}] @ [{inputs}, {outputs}] in {narrow}, group {group}"
                plain = x.double() @ wide.t()
                self.close(ops.weight_only_mm(self.place(x), packed), plain, what, dtype=dtype)
                out = ops.weight_only_mm(self.place(x), packed, self.place(bias))
                self.close(out, plain + bias.double(), f"{what}, with bias", dtype=dtype)

    @covers("scaled_mm", "scaled_mm_pack")
    @pytest.mark.parametrize("per_token", [False, True], ids=["per tensor", "per token"])
    @pytest.mark.parametrize("narrow", QUANTIZED, ids=str)
    def test_scaled_mm(self, dtype: torch.dtype, narrow: torch.dtype, per_token: bool) -> None:
        """ops.13: scaled_mm multiplies quantized matrices, packed or not, without overflow, then scales by rows of x
        and rows of the weight.
        """
        ops = self.table(dtype)
        for inputs, outputs in ((64, 48), (2048, 16), (100, 37), (7, 3)):
            weight = quantized(outputs, inputs, dtype=narrow, seed=1)
            weight_scale = _scales(outputs if per_token else 1, 1, seed=2) / inputs**0.5
            packed = ops.scaled_mm_pack(self.place(weight))
            for tokens in TOKENS:
                x, x_scale = quantized(tokens, inputs, dtype=narrow), _scales(tokens if per_token else 1, 1, seed=3)
                expected = (x.double() * x_scale.double()) @ (weight.double() * weight_scale.double()).t()
                for name, form in (("packed", packed), ("plain", self.place(weight))):
                    x_placed, *scales = self.place(x, x_scale, weight_scale)
                    out = ops.scaled_mm(x_placed, form, *scales, dtype)
                    what = f"[{tokens}, {inputs}] @ [{inputs}, {outputs}] in {narrow}, {name} weight"
                    self.close(out, expected, what, dtype=dtype)

    @covers("block_scaled_mm", "block_scaled_pack")
    @pytest.mark.parametrize("narrow", QUANTIZED, ids=str)
    def test_block_scaled_mm(self, dtype: torch.dtype, narrow: torch.dtype) -> None:
        """ops.14: block_scaled_mm scales each group of inputs on both sides before it sums."""
        ops = self.table(dtype)
        for inputs, outputs, group in ((128, 48, 32), (100, 37, 24), (256, 130, 128)):
            weight, scale = _scaled_weight(outputs, inputs, group, narrow)
            packed = ops.block_scaled_pack(*self.place(weight, scale), group)
            wide = _dequantized(weight, scale, group)
            for tokens in TOKENS:
                x, x_scale = quantized(tokens, inputs, dtype=narrow), _scales(tokens, -(-inputs // group), seed=3)
                expected = _dequantized(x, x_scale, group) @ wide.t()
                x_placed, x_scale_placed = self.place(x, x_scale)
                out = ops.block_scaled_mm(x_placed, packed, x_scale_placed, dtype)
                what = f"[{tokens}, {inputs}] @ [{inputs}, {outputs}] in {narrow}, groups of {group}"
                self.close(out, expected, what, dtype=dtype)

    @covers("w4a16_mm")
    @pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero points"])
    def test_w4a16_mm(self, dtype: torch.dtype, zeros: bool) -> None:
        """ops.15: w4a16_mm unpacks the low half of each byte first, and takes (value - zero) × scale per group."""
        ops = self.table(dtype)
        generator = torch.Generator().manual_seed(5)
        for inputs, outputs, group in ((64, 48, 32), (24, 5, 4), (256, 130, 128)):
            values = torch.randint(0, 16, (outputs, inputs), generator=generator)
            shape = (outputs, inputs // group)
            scales = randn(*shape, dtype=dtype, seed=2).abs()
            points = torch.randint(0, 16, shape, generator=generator).to(dtype) if zeros else None
            packed = (values[:, ::2] | (values[:, 1::2] << 4)).to(torch.uint8)
            shift = 8.0 if points is None else points.double().repeat_interleave(group, dim=1)
            wide = (values.double() - shift) * scales.double().repeat_interleave(group, dim=1)
            for tokens in TOKENS:
                x = randn(tokens, inputs, dtype=dtype, seed=tokens)
                placed = self.place(x, packed, scales)
                out = ops.w4a16_mm(*placed, None if points is None else self.place(points), group)
                what = f"[{tokens}, {inputs}] @ [{inputs}, {outputs}], groups of {group}"
                self.close(out, x.double() @ wide.t(), what, dtype=dtype)

    @covers("moe_experts", "experts_pack")
    @pytest.mark.parametrize("choices", [1, 2, 4])
    def test_moe_experts(self, dtype: torch.dtype, choices: int) -> None:
        """ops.16: moe_experts sums each token's experts by their weights; ids outside of the experts add nothing, and
        experts without tokens are fine.
        """
        ops = self.table(dtype)
        experts, width, inner = 6, 48, 40
        gate_up = randn(experts, 2 * inner, width, dtype=dtype, seed=1) / width**0.5
        down = randn(experts, width, inner, dtype=dtype, seed=2) / inner**0.5
        packed = [ops.experts_pack(weight) for weight in self.place(gate_up, down)]
        generator = torch.Generator().manual_seed(3)
        for tokens in TOKENS:
            x = randn(tokens, width, dtype=dtype)
            ids = torch.rand(tokens, experts - 1, generator=generator).argsort(1)[:, :choices]  # the last has no token
            ids[::5, 0] = -1
            ids[2::7, -1] = experts
            weights = torch.rand(tokens, choices, generator=generator)
            x_placed, ids_placed, weights_placed = self.place(x, ids, weights)
            out = ops.moe_experts(x_placed, *packed, ids_placed, weights_placed)
            expected = _experts(x.double(), gate_up.double(), down.double(), ids, weights.double())
            what = f"{tokens} tokens, {choices} of {experts} experts each"
            self.close(out, expected, what, dtype=dtype, looser=2)  # each of three products is rounded

    @covers("quantized_experts_mm", "quantized_experts_pack")
    @pytest.mark.parametrize("group", GROUPS, ids="group {}".format)
    @pytest.mark.parametrize("narrow", [*QUANTIZED, torch.uint8], ids=str)
    def test_quantized_experts(self, dtype: torch.dtype, narrow: torch.dtype, group: int | None) -> None:
        """ops.26: quantized_experts_mm multiplies rows that are sorted by expert with their own expert's weight in 8 or
        4 bits, also where experts have no rows; rows may be in the dtype of the weight.
        """
        ops = self.table(dtype)
        experts, inputs, outputs = 5, 96, 40
        pairs = narrow is torch.uint8
        shape = (experts * outputs, inputs // 2 if pairs else inputs)
        weight = quantized(*shape, dtype=torch.int8 if pairs else narrow, seed=1)
        scale = _scales(experts * outputs, inputs // (group or inputs), seed=2) / inputs**0.5
        zero = torch.arange(scale.numel()).remainder(16).float().view_as(scale) if pairs else torch.zeros_like(scale)
        values = _values_of_pairs(weight) if pairs else weight.double()
        wide = _dequantized(values - zero.double().repeat_interleave(group or inputs, 1), scale, group)
        stacked = [x.view(experts, outputs, -1) for x in (weight.view(torch.uint8) if pairs else weight, scale, zero)]
        weight_placed, scale_placed, zero_placed = self.place(*stacked)
        packed = ops.quantized_experts_pack(weight_placed, scale_placed, zero_placed if pairs else None, group)
        for counts in ((0, 0, 0, 0, 0), (1, 0, 0, 0, 0), (3, 0, 41, 1, 0), (20, 30, 40, 50, 60)):
            rows = torch.tensor(counts)
            starts = torch.cat([torch.zeros(1, dtype=torch.int64), rows.cumsum(0)])
            own = wide.view(experts, outputs, inputs)[torch.arange(experts).repeat_interleave(rows)]
            x = randn(int(rows.sum()), inputs, dtype=dtype)
            out = ops.quantized_experts_mm(self.place(x), packed, self.place(starts))
            what = f"{counts} rows of the experts, weights in {narrow}, group {group}"
            self.close(out, torch.einsum("ni,noi->no", x.double(), own), what, dtype=dtype)
            if pairs:
                continue
            x, x_scale = quantized(len(x), inputs, dtype=narrow, seed=4), _scales(len(x), scale.shape[1], seed=3)
            placed = self.place(x, starts, x_scale)
            out = ops.quantized_experts_mm(placed[0], packed, *placed[1:], dtype)
            expected = torch.einsum("ni,noi->no", _dequantized(x, x_scale, group), own)
            self.close(out, expected, f"{what}, and rows too", dtype=dtype)

    @covers("choose_experts")
    @pytest.mark.parametrize(("experts", "active"), [(1, 1), (6, 2), (33, 5), (128, 8)])
    @pytest.mark.parametrize("normalize", [True, False])
    def test_choose_experts(self, dtype: torch.dtype, experts: int, active: int, normalize: bool) -> None:
        """ops.23: choose_experts takes each token's most probable experts in their order, any of equals, and gives
        their probabilities in float32, scaled to sum to 1 or as they are.
        """
        ops = self.table(dtype)
        for tokens in TOKENS:
            logits = 3 * randn(tokens, experts + 3, dtype=dtype)[:, 3:]
            ids, weights = (out.cpu() for out in ops.choose_experts(self.place(logits), active, normalize))
            what = f"{active} of {experts} experts for {tokens} tokens"
            self.equal((ids.dtype, tuple(ids.shape)), (torch.int64, (tokens, active)), f"ids of {what}")
            self.check(all(len(set(row)) == active for row in ids.tolist()), f"{what}: chosen twice: {ids}")
            best = logits.double().sort(-1, descending=True).values[:, :active]
            self._exact(logits.double().gather(1, ids), best, f"logits of {what}")
            expected = reference.choose_experts(logits.double(), active, normalize)[1]
            self.near(weights.double(), expected.double(), f"weights of {what}", 1e-5)
            self.equal(weights.dtype, torch.float32, f"dtype of weights of {what}")

    # ---- cache

    @covers("write_kv")
    def test_write_kv(self, dtype: torch.dtype) -> None:
        """ops.17: write_kv stores each token at its slot, whatever the strides and dtype of the cache, and nothing
        elsewhere.
        """
        ops = self.table(dtype)
        for kv_dtype in (dtype, torch.bfloat16, torch.float32):
            merged = randn(5, 6, 32, dtype=dtype)
            slots = torch.tensor([3 * 8 + 7, 8, 9, 5 * 8, 2 * 8 + 1])
            wide = self.place(torch.zeros(2, 6, 2, 8, 32, dtype=kv_dtype))
            k_cache, v_cache = wide.transpose(2, 3).unbind(0)
            _, k, v = self.place(merged).split_with_sizes([2, 2, 2], 1)
            ops.write_kv(k, v, k_cache, v_cache, self.place(slots))
            for name, cached, column in (("keys", k_cache, 2), ("values", v_cache, 4)):
                expected = torch.zeros(6 * 8, 2, 32, dtype=kv_dtype)
                expected[slots] = merged[:, column : column + 2].to(kv_dtype)
                self._exact(cached.flatten(0, 1), expected, f"{name} in a {kv_dtype} cache, slots {slots.tolist()}")

    @covers("paged_attention")
    @pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (5, None), (None, 3.0), (20, 10.0)])
    def test_paged_attention(self, dtype: torch.dtype, window: int | None, soft_cap: float | None) -> None:
        """ops.18: paged_attention is causal attention of a ragged batch through block tables, with window, soft cap and
        grouped heads; padding tokens get finite rows.
        """
        ops = self.table(dtype)
        k_cache, v_cache = (randn(9, 4, 2, 16, dtype=dtype, seed=seed) for seed in (1, 2))
        table = torch.tensor([[3, 1, 8, 0], [2, 0, 0, 0], [5, 4, 7, 6], [0, 0, 0, 0]], dtype=torch.int32)
        starts = torch.tensor([0, 3, 4, 14, 14], dtype=torch.int32)
        lengths = torch.tensor([11, 1, 14, 0], dtype=torch.int32)
        q = 2 * randn(17, 6, 16, dtype=dtype, seed=3)
        arguments = (q, k_cache, v_cache, table, starts, lengths)
        out = ops.paged_attention(*self.place(*arguments), 0.3, window, soft_cap)
        expected = reference.paged_attention(
            q.double(), k_cache.double(), v_cache.double(), table, starts, lengths, 0.3, window, soft_cap
        )
        what = f"3 requests, window {window}, soft cap {soft_cap}"
        self.close(out[:14], expected[:14], what, dtype=dtype)
        self.check(bool(out[14:].isfinite().all()), f"rows of padding tokens: {out[14:]}")

    # ---- sampling

    @covers("sample")
    @pytest.mark.parametrize("size", [1, 100, 1030, 5000])
    def test_greedy_sample(self, dtype: torch.dtype, size: int) -> None:
        """ops.19: greedy rows take the first of the largest logits, whether or not all rows are greedy."""
        ops, logits = self.table(dtype), randn(40, size + 3, dtype=dtype)[:, :size]
        logits[:, size // 2 :] = logits[:, size // 2 :].round()  # ties
        best = logits == logits.amax(-1, keepdim=True)
        expected = torch.where(best, torch.arange(size), size).amin(-1)
        for all_greedy in (True, False):
            out = ops.sample(self.place(logits), self._parameters([0.0] * 40, all_greedy=all_greedy))
            self._exact(out, expected, f"greedy tokens of 40 rows of {size} logits, all_greedy {all_greedy}")

    @covers("sample")
    def test_greedy_sample_of_infinities(self, dtype: torch.dtype) -> None:
        """ops.20: greedy rows with masked tokens, infinities and NaN take the largest, and NaN counts as larger."""
        ops, inf = self.table(dtype), torch.inf
        logits = torch.zeros(6, 3000, dtype=dtype)
        logits[0] = -inf
        logits[0, 2500] = -5
        logits[1, 1500] = inf
        logits[2, 1500], logits[2, 2000] = inf, torch.nan
        logits[3, :2999] = -inf
        logits[4, 2990] = torch.nan
        logits[5] = -inf
        out = ops.sample(self.place(logits), self._parameters([0.0] * 6))
        self.equal(out.tolist(), [2500, 1500, 2000, 2999, 2990, 0], "greedy tokens of rows with infinities and NaN")

    @covers("sample")
    @pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.1}], ids=str)
    def test_seeded_sample(self, dtype: torch.dtype, filters: dict[str, Any]) -> None:
        """ops.21: sampled tokens are those of the stateless noise of seed and position, after temperature, min-p, top-k
        and top-p, and depend on no other row.
        """
        ops, logits = self.table(dtype), 3 * randn(64, 500, dtype=dtype)
        temperatures = [0.0, 0.5, 1.0, 1.7] * 16
        out = ops.sample(self.place(logits), self._parameters(temperatures, **filters)).cpu()
        expected = reference.sample(logits, self._parameters(temperatures, device=torch.device("cpu"), **filters))
        self._exact(out, expected, f"tokens of 64 rows at temperatures 0, 0.5, 1, 1.7 with {filters or 'no filters'}")
        few = self._parameters(temperatures, **filters).rows(self.place(torch.tensor([5, 42])))
        alone = ops.sample(self.place(logits[[5, 42]]), few)
        self._exact(alone, expected[[5, 42]], f"tokens of rows 5 and 42 alone with {filters or 'no filters'}")

    @covers("filter_logits")
    @pytest.mark.parametrize(
        "filters", [{}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_k": 2000, "top_p": 0.5}], ids=str
    )
    def test_filter_logits(self, dtype: torch.dtype, filters: dict[str, Any]) -> None:
        """ops.27: filter_logits divides by the temperature and drops what is below the last token kept, none tied with
        it; greedy rows keep everything.
        """
        ops, temperatures = self.table(dtype), [0.0, 0.5, 1.0, 1.7]
        host = torch.device("cpu")
        for size, spread in ((1, 1.0), (500, 3.0), (3000, 0.1)):
            logits = spread * randn(4, size, dtype=dtype)
            out = ops.filter_logits(self.place(logits), self._parameters(temperatures, **filters))
            expected = reference.filter_logits(logits, self._parameters(temperatures, device=host, **filters))
            what = f"rows of {size} logits with {filters or 'no filters'}"
            self.equal(out.dtype, torch.float32, f"dtype of {what}")
            dropped = expected == -torch.inf
            self.check(torch.equal(out.cpu() == -torch.inf, dropped), f"{what}: dropped other tokens")
            self.near(out.cpu().masked_fill(dropped, 0), expected.masked_fill(dropped, 0), what, 1e-6)

    @covers("sample_residual")
    @pytest.mark.parametrize("size", [1, 100, 5000])
    def test_sample_residual(self, dtype: torch.dtype, size: int) -> None:
        """ops.29: sample_residual draws from what is left of one distribution over another, with noise of its own, or
        from the first where nothing is left.
        """
        ops, host = self.table(dtype), torch.device("cpu")
        probs = (2 * randn(40, size, dtype=torch.float32)).softmax(-1)
        drafts = (2 * randn(40, size, dtype=torch.float32, seed=1)).softmax(-1)
        drafts[::5] = probs[::5]
        drafts[1::5] = 0
        probs[2::5, size // 2 + 1 :] = 0
        out = ops.sample_residual(*self.place(probs, drafts), self._parameters([1.0] * 40))
        expected = reference.sample_residual(probs, drafts, self._parameters([1.0] * 40, device=host))
        self._exact(out, expected, f"tokens of 40 rows of {size} probabilities")

    @covers("penalize")
    @pytest.mark.parametrize("size", [1, 100, 5000])
    def test_penalize(self, dtype: torch.dtype, size: int) -> None:
        """ops.25: penalize changes the given rows in place: repetition by prompt and output, frequency and presence by
        the output alone.
        """
        ops, logits = self.table(dtype), 3 * randn(5, size, dtype=torch.float32)
        logits[2, size // 2 :] = -torch.inf
        counts = (3 * randn(3, size, dtype=torch.float32, seed=1)).clamp(min=0).to(torch.int32)
        in_prompt = randn(3, size, dtype=torch.float32, seed=2) > 0.5
        factors = torch.tensor([[1.3, 0.0, 0.0], [0.8, 0.5, -0.2], [1.0, 0.3, 1.5]])
        for rows, slots in (([], []), ([4, 0, 2], [2, 1, 0])):
            rows_P, slots_P = (torch.tensor(places, dtype=torch.int64) for places in (rows, slots))
            expected, placed = logits.clone(), self.place(logits)
            reference.penalize(expected, rows_P, slots_P, factors, counts, in_prompt)
            ops.penalize(placed, *self.place(rows_P, slots_P, factors, counts, in_prompt))
            what = f"rows {rows} of {size} penalised logits"
            out, forbidden = placed.cpu(), expected == -torch.inf
            self.check(torch.equal(out == -torch.inf, forbidden), f"forbidden tokens in {what}")
            self.near(out.masked_fill(forbidden, 0), expected.masked_fill(forbidden, 0), what, 1e-5)

    @covers("top_logprobs")
    @pytest.mark.parametrize("k", [0, 1, 20])
    def test_top_logprobs(self, dtype: torch.dtype, k: int) -> None:
        """ops.24: top_logprobs gives a token's log-probability and rank, and the most likely tokens with theirs, equals
        by ascending id.
        """
        ops = self.table(dtype)
        for size in (20, 1030, 5000):
            logits = 3 * randn(7, size + 3, dtype=dtype)[:, :size]
            logits[1] = logits[1].round()  # ties
            logits[2] = 0
            logits[3, 20:] = -torch.inf
            logits[4] *= 20
            tokens = torch.arange(7) * 3 % size
            expected = reference.top_logprobs(logits.double(), tokens, k)
            out = ops.top_logprobs(*self.place(logits, tokens), k)
            what = f"7 rows of {size} logits, {k} named"
            for name, column in (("log-probabilities", 0), ("log-probabilities of the most likely tokens", 3)):
                self.equal(out[column].dtype, torch.float32, f"dtype of the {name} of {what}")
                self.equal(tuple(out[column].shape), tuple(expected[column].shape), f"shape of the {name} of {what}")
                self.near(out[column].cpu().double(), expected[column].double(), f"{name} of {what}", 1e-5)
            self._exact(out[1], expected[1], f"ranks of {what}")
            self._exact(out[2], expected[2], f"most likely tokens of {what}")

    # ---- rows

    @covers("rms_norm", "add_rms_norm", "silu_and_mul", "gelu_tanh_and_mul", "linear", "moe_experts", "sample")
    def test_rows_are_independent(self, dtype: torch.dtype) -> None:
        """ops.22: a row of NaN, which fails one request, changes the result of no other row."""
        ops, width = self.table(dtype), 64
        weight = self.place(randn(width, dtype=dtype, seed=1))
        packed = ops.linear_pack(self.place(randn(40, width, dtype=dtype, seed=2)))
        stacks = [randn(4, 2 * 32, width, dtype=dtype, seed=3), randn(4, width, 32, dtype=dtype, seed=4)]
        experts = [ops.experts_pack(stack) for stack in self.place(*stacks)]
        ids, factors = self.place(torch.tensor([[0, 1]] * 9), torch.full((9, 2), 0.5))
        greedy = self._parameters([0.0] * 9)
        calls: dict[str, Callable[[Tensor], Tensor]] = {
            "rms_norm": lambda x: ops.rms_norm(x, weight, 1e-5),
            "add_rms_norm": lambda x: ops.add_rms_norm(x, x, weight, 1e-5)[0],
            "silu_and_mul": ops.silu_and_mul,
            "gelu_tanh_and_mul": ops.gelu_tanh_and_mul,
            "linear": lambda x: ops.linear(x, packed),
            "moe_experts": lambda x: ops.moe_experts(x, *experts, ids, factors),
            "sample": lambda x: ops.sample(x, greedy).unsqueeze(1),
        }
        healthy = randn(9, width, dtype=dtype)
        poisoned = healthy.clone()
        poisoned[4] = torch.nan
        others = [0, 1, 2, 3, 5, 6, 7, 8]
        for name, call in calls.items():
            before, after = (call(self.place(x)).cpu()[others] for x in (healthy, poisoned))
            self.near(after, before.double(), f"{name} of rows beside one of NaN", TOLERANCE[dtype])

    # ---- comparisons

    def _rows(
        self, actual: Tensor, expected: Tensor, what: str, dtype: torch.dtype, floor: float = 1e-2
    ) -> None:
        """Compare row by row, each in units of its own largest value, or of ``floor``: rows differ in magnitude."""
        __tracebackhide__ = True
        self.equal(tuple(actual.shape), tuple(expected.shape), f"shape of {what}")
        self.equal(actual.dtype, dtype, f"dtype of {what}")
        if expected.numel():
            size = expected.abs().amax(-1, keepdim=True).clamp(min=floor)
            self.near(actual.cpu().double() / size, expected / size, what, ELEMENTWISE * TOLERANCE[dtype])

    def _exact(self, actual: Tensor, expected: Tensor, what: str) -> None:
        __tracebackhide__ = True
        self.equal(actual.dtype, expected.dtype, f"dtype of {what}")
        self.equal(tuple(actual.shape), tuple(expected.shape), f"shape of {what}")
        wrong = (actual.cpu() != expected).nonzero()
        if len(wrong):
            place = tuple(wrong[0].tolist())
            self.fail(
                f"{what}: at {list(place)} expected {expected[place].item()}, got {actual[place].item()}; "
                f"{len(wrong)} of {expected.numel()} values are wrong."
            )

    def _quantized(
        self, rows: Sequence[Tensor], x: Tensor, narrow: torch.dtype, group: int | None, rounding: float = 0.0
    ) -> None:
        """Values and scales of ``x``, which may have been rounded before, relative to a row's largest element."""
        __tracebackhide__ = True
        (values, scales), (tokens, inputs) = rows, x.shape
        size, what = group or inputs, f"{list(x.shape)} in {narrow}, group {group}"
        self.equal((values.dtype, scales.dtype), (narrow, torch.float32), f"dtypes of values and scales of {what}")
        self.equal(tuple(values.shape), (tokens, inputs), f"shape of the values of {what}")
        self.equal(tuple(scales.shape), (tokens, -(-inputs // size)), f"shape of the scales of {what}")
        if not tokens:
            return
        slack = rounding * x.abs().amax(1, keepdim=True)
        scale_TI = scales.cpu().double().repeat_interleave(size, dim=1)[:, :inputs]
        self._nearest(values.cpu().double() * scale_TI, x, scale_TI, narrow, what, slack)
        peaks = torch.stack([x[:, i : i + size].abs().amax(1) for i in range(0, inputs, size)], dim=1)
        largest = 127.0 if narrow is torch.int8 else torch.finfo(narrow).max
        found = scales.cpu().double() * largest
        ratios = found.clamp(peaks - slack, peaks + slack) / found
        self.near(ratios, torch.ones_like(ratios), f"peaks / scales of {what}", 1e-5)

    def _nearest(
        self, actual: Tensor, x: Tensor, scale: Tensor, narrow: torch.dtype, what: str, slack: Tensor
    ) -> None:
        """Half a step of the narrow dtype, and a little for the division before."""
        __tracebackhide__ = True
        magnitudes = (x / scale).abs().clamp(min=2.0**-6)
        step = torch.ones_like(x) if narrow is torch.int8 else magnitudes.log2().floor().exp2() / 8
        error = ((actual - x).abs() - slack) / (scale * step)
        if float(error.max()) > 0.51:
            self.fail(f"{what}: an element is {float(error.max()):.3g} steps off; rounding leaves at most 0.5.")

    def _parameters(
        self,
        temperatures: Sequence[float],
        *,
        device: torch.device | None = None,
        all_greedy: bool | None = None,
        top_k: float = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
    ) -> SamplingTensors:
        rows = len(temperatures)
        columns = {
            "temperature_S": torch.tensor(temperatures),
            "top_k_S": torch.full((rows,), int(top_k)),
            "top_p_S": torch.full((rows,), top_p),
            "min_p_S": torch.full((rows,), min_p),
            "seeds_S": torch.arange(rows) * 7919 - 5,
            "positions_S": torch.arange(rows) % 11,
        }
        where = device or _platform(self.tested.cls).device
        greedy = not any(temperatures)
        return SamplingTensors(
            **{name: column.to(where) for name, column in columns.items()},
            all_greedy=greedy if all_greedy is None else all_greedy,
            any_filter=not greedy and (top_k > 0 or top_p < 1 or min_p > 0),
        )


def _magnitudes(tokens: int, dtype: torch.dtype) -> Tensor:
    """A factor per row, from very small to large."""
    return torch.logspace(-2, 2, max(1, tokens), dtype=torch.float64)[:tokens].unsqueeze(1).to(dtype)


def _scales(rows: int, columns: int, seed: int) -> Tensor:
    return randn(rows, columns, dtype=torch.float32, seed=seed).abs() * 0.01 + 0.001


def _scaled_weight(outputs: int, inputs: int, group: int | None, narrow: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = quantized(outputs, inputs, dtype=narrow, seed=1)
    return weight, _scales(outputs, -(-inputs // (group or inputs)), seed=2) / inputs**0.5


def _dequantized(values: Tensor, scales: Tensor, group: int | None) -> Tensor:
    size = values.shape[1]
    return values.double() * scales.double().repeat_interleave(group or size, dim=1)[:, :size]


def _values_of_pairs(weight: Tensor) -> Tensor:
    """``[O, I]`` of the bytes of pairs, the low half first."""
    stored = weight.view(torch.uint8)
    return torch.stack([stored % 16, stored // 16], dim=-1).flatten(1).double()


def _experts(x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
    """Token by token, expert by expert, in float64."""
    out_TD = torch.zeros_like(x_TD)
    for t, (ids, weights) in enumerate(zip(ids_TA.tolist(), weights_TA.tolist(), strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            if 0 <= expert < len(gate_up_EFD):
                gate_F, up_F = (gate_up_EFD[expert] @ x_TD[t]).chunk(2)
                out_TD[t] += weight * (down_EDF[expert] @ (gate_F / (1 + torch.exp(-gate_F)) * up_F))
    return out_TD


@cache
def _platform(cls: type[Platform]) -> Platform:
    return cls(PlatformConfig(num_threads=2))
