"""What the readers of checkpoints with 4-bit weights have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable
from dovetail.contracts.quant import PackedLinear, QuantMethod, TensorSpec
from dovetail.errors import ConfigError
from dovetail_quant.experts import Stacked, together
from dovetail_quant.on_load import PLAIN_LAYERS

PER_WORD = 8
"""Values in an int32."""


class Pairs(NamedTuple):
    """What ``w4a16_mm`` reads of one layer.

    Attributes:
        order_I: of the inputs as they are stored; None if that is their own.
    """

    weight: Tensor
    scale_OG: Tensor
    zero_OG: Tensor | None
    group_size: int
    order_I: Tensor | None


class FourBits(QuantMethod):
    """Weights in groups of inputs, a scale and a zero point for each.

    Attributes:
        name: the section's ``quant_method``.
    """

    name: ClassVar[str]

    @classmethod
    def recognises(cls, quantization_config: Mapping[str, Any]) -> bool:
        """By its name; what it says beyond that is checked when the model is built."""
        return quantization_config.get("quant_method") == cls.name

    def applies_to(self, layer: str) -> bool:
        """All but the output head and routers."""
        return layer.rpartition(".")[2] not in PLAIN_LAYERS

    @abstractmethod
    def group_of(self, in_features: int) -> int:
        """Inputs that share a scale, in a layer with so many."""
        ...

    def grids(self, in_features: int, out_features: int) -> Mapping[str, TensorSpec]:
        """``qzeros`` and ``scales``, one row per group.

        Raises:
            ConfigError: words or groups do not divide the layer.
        """
        group = self.group_of(in_features)
        for what, size, of in (("outputs", out_features, PER_WORD), ("inputs", in_features, max(group, PER_WORD))):
            if size % of:
                raise ConfigError(
                    f"A layer has {size} {what}, which {of} does not divide: quantization_config of config.json "
                    f"(quant_method {self.name!r}) does not fit it. Use another checkpoint."
                )
        rows = in_features // group
        words = (rows, out_features // PER_WORD)
        return {
            "qzeros": TensorSpec(shape=words, dtype=torch.int32, output_dim=1, output_scale=(1, PER_WORD)),
            "scales": TensorSpec(shape=(rows, out_features), dtype=torch.float32, output_dim=1),
        }

    def apply(self, x_TI: Tensor, packed: PackedLinear, bias_O: Tensor | None, ops: OpTable) -> Tensor:
        """``x @ weightᵀ + bias``."""
        x_TI = x_TI if packed.order_I is None else x_TI.index_select(1, packed.order_I)
        y_TO = ops.w4a16_mm(x_TI, packed.weight, packed.scale_OG, packed.zero_OG, packed.group_size)
        return y_TO if bias_O is None else y_TO + bias_O

    def prepare_experts(
        self, experts: Iterable[Mapping[str, Tensor]], ops: OpTable, dtype: torch.dtype
    ) -> PackedLinear:
        """All together, where the platform multiplies them so; they share the order of their inputs."""
        each: list[Pairs] = super().prepare_experts(experts, ops, dtype)
        if not together(ops):
            return each
        weight_EOI = torch.stack([packed.weight for packed in each])
        scale_EOG = torch.stack([packed.scale_OG for packed in each])
        zeros = [torch.full_like(one.scale_OG, 8) if one.zero_OG is None else one.zero_OG.float() for one in each]
        zero_EOG = None if all(one.zero_OG is None for one in each) else torch.stack(zeros)
        packed = ops.quantized_experts_pack(weight_EOI, scale_EOG, zero_EOG, each[0].group_size)
        return Stacked(packed, each[0].order_I)

    def apply_experts(self, x_NI: Tensor, packed: PackedLinear, starts_E1: Tensor, ops: OpTable) -> Tensor:
        """See the contract."""
        if not isinstance(packed, Stacked):
            return super().apply_experts(x_NI, packed, starts_E1, ops)
        x_NI = x_NI if packed.order_I is None else x_NI.index_select(1, packed.order_I)
        return ops.quantized_experts_mm(x_NI, packed.weight, starts_E1)


def spread(words: Tensor) -> Tensor:
    """uint8 ``[R, 8 C]``: the values 0 .. 15 of int32 ``[R, C]``, lowest bits first."""
    stored = words.contiguous().view(torch.uint8)
    return torch.stack([stored & 0xF, stored >> 4], dim=-1).flatten(1)


def joined(values_OI: Tensor) -> Tensor:
    """uint8 ``[O, I / 2]``, as ``w4a16_mm`` reads it."""
    return values_OI[:, ::2] | values_OI[:, 1::2] << 4


def points(zero_GO: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Zero points for ``w4a16_mm``, to which 8 everywhere is None."""
    return None if bool((zero_GO == 8).all()) else zero_GO.to(dtype).t()


def checked(section: Mapping[str, Any], name: str, allowed: tuple[Any, ...]) -> Any:
    """A field of the section; where it is absent or null, the first allowed value.

    Raises:
        ConfigError: it has another value.
    """
    value = section.get(name)
    value = allowed[0] if value is None else value
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        wanted = " or ".join(repr(choice) for choice in allowed)
        raise ConfigError(f"{name!r} in quantization_config of config.json is {value!r}; it must be {wanted}.")
    return value


def group_size(section: Mapping[str, Any], name: str) -> int | None:
    """The field that says how many inputs share a scale; None for all of them.

    Raises:
        ConfigError: it is neither positive and even, nor -1.
    """
    value = section.get(name)
    if type(value) is not int or (value != -1 and (value < 1 or value % 2)):
        raise ConfigError(
            f"{name!r} in quantization_config of config.json is {value!r}; it must be positive and even, or -1."
        )
    return None if value == -1 else value
