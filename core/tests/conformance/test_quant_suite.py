"""The suite of number formats passes sound ones and catches broken ones, each by the scenario that it breaks."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.contracts.quant import PackedLinear, QuantMethod, RowFormat, RowProduct, TensorSpec
from dovetail.errors import ConfigError
from dovetail.plugins.manifest import QuantManifest
from dovetail.testing.conformance import QuantSuite, registered, unregistered
from dovetail.testing.conformance.run import run

SECTION = {"quant_method": "rows", "bits": 8}
MANIFEST = QuantManifest(
    name="rows",
    summary="For a test.",
    checkpoint_methods=("rows",),
    on_load=True,
    ops=frozenset({"weight_only_pack", "weight_only_mm"}),
    experts=True,
)


def quantize(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """int8 ``[O, I]`` and float32 scales ``[O, 1]``."""
    scale_O1 = weight_OI.float().abs().amax(1, keepdim=True) / 127
    scale_O1 = torch.where(scale_O1 > 0, scale_O1, 1.0)
    return (weight_OI.float() / scale_O1).round().to(torch.int8), scale_O1


class Rows(QuantMethod):
    """int8 weights with a scale per output; on load, and from checkpoints."""

    @classmethod
    def recognises(cls, quantization_config: Mapping[str, Any]) -> bool:
        return quantization_config.get("quant_method") == "rows"

    def __init__(self, quantization_config: Mapping[str, Any] | None) -> None:
        bits = 8 if quantization_config is None else quantization_config.get("bits")
        if bits != 8:
            raise ConfigError(f"'bits' in quantization_config is {bits!r}; it must be 8.")
        self.on_load = quantization_config is None

    def applies_to(self, layer: str) -> bool:
        return layer != "lm_head"

    def tensors(self, in_features: int, out_features: int, dtype: torch.dtype) -> Mapping[str, TensorSpec]:
        if self.on_load:
            return {"weight": TensorSpec(shape=(out_features, in_features), dtype=dtype)}
        return {
            "weight": TensorSpec(shape=(out_features, in_features), dtype=torch.int8),
            "scale": TensorSpec(shape=(out_features, 1), dtype=torch.float32),
        }

    def prepare(self, tensors: Mapping[str, Tensor], ops: OpTable, dtype: torch.dtype) -> PackedLinear:
        if self.on_load:
            return ops.weight_only_pack(*quantize(tensors["weight"]))
        return ops.weight_only_pack(tensors["weight"], tensors["scale"])

    def apply(self, x_TI: Tensor, packed: PackedLinear, bias_O: Tensor | None, ops: OpTable) -> Tensor:
        return ops.weight_only_mm(x_TI, packed, bias_O)


class InTorch(Rows):
    """The same without operations of the platform: what most mutants below change."""

    def prepare(self, tensors, ops, dtype):
        weight_OI, scale_O1 = self.stored(tensors)
        return weight_OI, scale_O1

    def stored(self, tensors):
        return quantize(tensors["weight"]) if self.on_load else (tensors["weight"], tensors["scale"])

    def apply(self, x_TI, packed, bias_O, ops):
        weight_OI, scale_O1 = packed
        return F.linear(x_TI, (weight_OI * scale_O1).to(x_TI.dtype), bias_O)


class RowsSuite(QuantSuite):
    sections = (SECTION,)
    error = 0.012

    @staticmethod
    def store(weight_OI: Tensor, section: Mapping[str, Any]) -> Mapping[str, Tensor]:
        return dict(zip(("weight", "scale"), quantize(weight_OI), strict=True))


class RecognisesAnything(InTorch):
    """quant.1"""

    @classmethod
    def recognises(cls, quantization_config):
        return "quant_method" in quantization_config


class NeedsEveryField(InTorch):
    """quant.2"""

    def __init__(self, quantization_config):
        super().__init__(quantization_config and {"bits": quantization_config["bits"]})


class CountsBits(InTorch):
    """quant.2"""

    def __init__(self, quantization_config):
        self.on_load = quantization_config is None
        self.largest = 2 ** (quantization_config or SECTION)["bits"]


class AppliesToNothing(InTorch):
    """quant.3"""

    def applies_to(self, layer):
        return layer.startswith("transformer.")


class AppliesEveryOtherTime(InTorch):
    """quant.3"""

    count = 0

    def applies_to(self, layer):
        self.count += 1
        return self.count % 2 == 1


class ScaleOfWrongSize(InTorch):
    """quant.4"""

    def tensors(self, in_features, out_features, dtype):
        specs = dict(super().tensors(in_features, out_features, dtype))
        return {**specs, "scale": TensorSpec(shape=(1, out_features), dtype=torch.float32)}


class TransposedWeight(InTorch):
    """quant.4"""

    def tensors(self, in_features, out_features, dtype):
        return super().tensors(out_features, in_features, dtype)


class InGroups(Rows):
    """Sound: it takes what its groups divide, and says so of the rest."""

    def tensors(self, in_features, out_features, dtype):
        if in_features % 32 or out_features % 8:
            raise ConfigError(f"A layer of {in_features} by {out_features} is not in blocks of 32 and 8.")
        return super().tensors(in_features, out_features, dtype)


class RefusesWithoutNumbers(InTorch):
    """quant.4"""

    def tensors(self, in_features, out_features, dtype):
        if in_features % 32:
            raise ConfigError("A layer is not in blocks.")
        return super().tensors(in_features, out_features, dtype)


class RefusesOrdinaryLayers(InTorch):
    """quant.4"""

    def tensors(self, in_features, out_features, dtype):
        if in_features % 128:
            raise ConfigError(f"A layer of {in_features} inputs is not in blocks of 128.")
        return super().tensors(in_features, out_features, dtype)


class BreaksOnOddLayers(InTorch):
    """quant.4"""

    def tensors(self, in_features, out_features, dtype):
        assert in_features % 32 == 0
        return super().tensors(in_features, out_features, dtype)


class ScalesOfNeighbours(InTorch):
    """quant.5"""

    def stored(self, tensors):
        weight_OI, scale_O1 = super().stored(tensors)
        return weight_OI, scale_O1.roll(1, 0)


class RoundsDown(InTorch):
    """quant.5"""

    def stored(self, tensors):
        weight_OI, scale_O1 = super().stored(tensors)
        return weight_OI - 1, scale_O1


class WideResults(InTorch):
    """quant.5"""

    def apply(self, x_TI, packed, bias_O, ops):
        return super().apply(x_TI.float(), packed, None if bias_O is None else bias_O.float(), ops)


class ScaleOfTheFirstPart(InTorch):
    """quant.6"""

    def stored(self, tensors):
        weight_OI = super().stored(tensors)
        dequantized_OI = weight_OI[0] * weight_OI[1]
        scale = (dequantized_OI[:32].abs().max() / 127).clamp(min=1e-30)
        values_OI = (dequantized_OI / scale).round().clamp(-127, 127)
        return values_OI.to(torch.int8), scale.expand(len(values_OI), 1).clone()


class ScalesTheBias(InTorch):
    """quant.7"""

    def apply(self, x_TI, packed, bias_O, ops):
        weight_OI, scale_O1 = packed
        product_TO = F.linear(x_TI, weight_OI.to(x_TI.dtype), bias_O)
        return (product_TO * scale_O1.t()).to(x_TI.dtype)


class ForgetsTheBias(InTorch):
    """quant.7"""

    def apply(self, x_TI, packed, bias_O, ops):
        return super().apply(x_TI, packed, None, ops)


class OneScaleForAllRows(InTorch):
    """quant.8"""

    def apply(self, x_TI, packed, bias_O, ops):
        if not x_TI.numel():
            return super().apply(x_TI, packed, bias_O, ops)
        step = (x_TI.float().abs().max() / 127).clamp(min=1e-30)
        return super().apply(((x_TI.float() / step).round() * step).to(x_TI.dtype), packed, bias_O, ops)


class SmallestScale(InTorch):
    """quant.9"""

    def stored(self, tensors):
        weight_OI, scale_O1 = super().stored(tensors)
        clamped_O1 = scale_O1.clamp(min=1e-4)
        return (weight_OI * scale_O1 / clamped_O1).round().to(torch.int8), clamped_O1


class DividesByZero(InTorch):
    """quant.10"""

    def stored(self, tensors):
        if not self.on_load:
            return super().stored(tensors)
        scale_O1 = tensors["weight"].float().abs().amax(1, keepdim=True)
        return tensors["weight"].float() / scale_O1, scale_O1


class SpoilsItsInput(InTorch):
    """quant.11"""

    def apply(self, x_TI, packed, bias_O, ops):
        return super().apply(x_TI.mul_(1.0000001).round_(decimals=3), packed, bias_O, ops)


class ReadsMemoryInOrder(InTorch):
    """quant.11"""

    def apply(self, x_TI, packed, bias_O, ops):
        flat = x_TI.as_strided((x_TI.numel(),), (1,), x_TI.storage_offset())
        return super().apply(flat.view(x_TI.shape), packed, bias_O, ops)


class RemembersTheLastLayer(InTorch):
    """quant.12"""

    def prepare(self, tensors, ops, dtype):
        self.last = super().prepare(tensors, ops, dtype)

    def apply(self, x_TI, packed, bias_O, ops):
        return super().apply(x_TI, self.last, bias_O, ops)


class RoundsByChance(InTorch):
    """quant.12"""

    def stored(self, tensors):
        weight_OI, scale_O1 = super().stored(tensors)
        return weight_OI, scale_O1 * (1 + 1e-3 * torch.rand_like(scale_O1))


class QuantizesInPlace(InTorch):
    """quant.13"""

    def stored(self, tensors):
        weight_OI, scale_O1 = super().stored(tensors)
        tensors["weight"].copy_(weight_OI)
        tensors["weight"].add_(1).sub_(2)
        return weight_OI.clone(), scale_O1


class KeepsTheOriginal(InTorch):
    """quant.14"""

    def prepare(self, tensors, ops, dtype):
        return [*super().prepare(tensors, ops, dtype), tensors]

    def apply(self, x_TI, packed, bias_O, ops):
        return super().apply(x_TI, packed[:2], bias_O, ops)


class UsesOtherOperations(InTorch):
    """quant.15"""

    def apply(self, x_TI, packed, bias_O, ops):
        values_TI, scale_T1 = ops.quantize_rows(x_TI, torch.int8)
        return super().apply((values_TI * scale_T1).to(x_TI.dtype), packed, bias_O, ops)


class ReadsPackedWeights(Rows):
    """quant.15"""

    def apply(self, x_TI, packed, bias_O, ops):
        weight_OI, scale_O1 = packed
        return F.linear(x_TI, (weight_OI * scale_O1).to(x_TI.dtype), bias_O)


class OtherProductForSomeSizes(InTorch):
    """quant.16"""

    def apply(self, x_TI, packed, bias_O, ops):
        y_TO = super().apply(x_TI, packed, bias_O, ops)
        return 1.5 * y_TO if len(x_TI) == 3 else y_TO


class ExpectsWholeLayers(InTorch):
    """quant.17"""

    def tensors(self, in_features, out_features, dtype):
        self.outputs = out_features
        return super().tensors(in_features, out_features, dtype)

    def prepare(self, tensors, ops, dtype):
        assert len(tensors["weight"]) == self.outputs
        return super().prepare(tensors, ops, dtype)


class ScalesOfTheFirstExpert(InTorch):
    """quant.17"""

    def prepare_experts(self, experts, ops, dtype):
        each = super().prepare_experts(experts, ops, dtype)
        return each if self.on_load else [(weight_OI, each[0][1]) for weight_OI, _ in each]


class CountsOnEveryExpert(InTorch):
    """quant.17"""

    def apply_experts(self, x_NI, packed, starts_E1, ops):
        starts = starts_E1.tolist()
        assert len(set(starts)) == len(starts), "an expert has no tokens"
        return super().apply_experts(x_NI, packed, starts_E1, ops)


class QuantizesRows(Rows):
    """Activations in 8 bits as well."""

    def row_product(self):
        return RowProduct(RowFormat(torch.int8), self.product)

    def prepare(self, tensors, ops, dtype):
        weight_OI, scale_O1 = quantize(tensors["weight"]) if self.on_load else (tensors["weight"], tensors["scale"])
        return ops.scaled_mm_pack(weight_OI), scale_O1

    def apply(self, x_TI, packed, bias_O, ops):
        return self.product(*ops.quantize_rows(x_TI, torch.int8), packed, bias_O, x_TI.dtype, ops)

    def product(self, x_TI, scale_T1, packed, bias_O, dtype, ops):
        y_TO = ops.scaled_mm(x_TI, packed[0], scale_T1, packed[1], dtype)
        return y_TO if bias_O is None else y_TO + bias_O


class ForgetsTheBiasOfQuantizedRows(QuantizesRows):
    """quant.18"""

    def row_product(self):
        return RowProduct(RowFormat(torch.int8), self.without_bias)

    def without_bias(self, x_TI, scale_T1, packed, bias_O, dtype, ops):
        return self.product(x_TI, scale_T1, packed, None, dtype, ops)


BROKEN = [*InTorch.__subclasses__(), ReadsPackedWeights, ForgetsTheBiasOfQuantizedRows]


def suite(method: type[QuantMethod]) -> type[QuantSuite]:
    """The public form, for a class that no plugin registers."""
    return type("TestSubject", (RowsSuite,), {"subject": unregistered(method, MANIFEST)})


class TestPlain(QuantSuite):
    """The core's own format."""

    subject = registered("none")
    error = 1e-6


@pytest.mark.parametrize("method", [Rows, InTorch, InGroups], ids=lambda method: method.__name__)
def test_a_sound_method_passes(method: type) -> None:
    results = run({"TestSubject": suite(method)})
    assert {r.test: r.reason for r in results if r.outcome != "passed"} == {
        f"test_rows_quantized_before[{section}-{dtype}]": "lacks a product with quantized rows"
        for dtype in ("float32", "bfloat16")
        for section in ("plain", "checkpoint 1")
    }


@pytest.mark.parametrize("method", BROKEN, ids=lambda method: method.__name__)
def test_a_broken_method_is_caught(method: type) -> None:
    scenario = (method.__doc__ or "").strip()
    results = run({"TestSubject": suite(method)}, only=[scenario])
    assert "failed" in {result.outcome for result in results}, results
