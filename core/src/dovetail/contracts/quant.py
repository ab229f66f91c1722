"""QuantMethod: a number format for weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable

PackedLinear = Any
"""One layer's weights in final form, or those of all experts; only the method that prepared it reads it."""

QuantizedRows = tuple[Tensor, Tensor]
"""Activations in 8 bits, and their scales, as ``quantize_rows`` returns them."""


class RowFormat(NamedTuple):
    """What ``quantize_rows`` makes of activations: its arguments of the same names."""

    dtype: torch.dtype
    group_size: int | None = None


class RowProduct(NamedTuple):
    """A product with activations that are quantized already.

    Attributes:
        format: of the activations.
        apply: called as ``apply(values_TI, scale_TG, packed, bias_O, out_dtype, ops)``; returns what
            ``QuantMethod.apply`` makes of the activations that were quantized.
    """

    format: RowFormat
    apply: Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One tensor that a linear layer expects from the checkpoint.

    Attributes:
        shape: of the whole layer (all merged outputs together).
        dtype: that it is stored in while loading.
        output_dim: dimension that grows with output features (merged layers are filled by slices of it), or None.
        output_scale: elements along ``output_dim`` per output feature, as ``(numerator, denominator)``.
        optional: may be absent from the checkpoint.
        broadcast: the checkpoint's tensor is one number (``[]`` or ``[1]``), which fills the whole tensor, or the whole
            range of its part of a merged layer.
        repeat: consecutive outputs of one part that share an element of the checkpoint's tensor along ``output_dim``,
            which must be 0; the last element of a part may stand for fewer. The loader repeats each, so that parts of
            any size lie side by side.
        also: other suffixes under which checkpoints store it, one at a time.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    output_dim: int | None = 0
    output_scale: tuple[int, int] = (1, 1)
    optional: bool = False
    broadcast: bool = False
    repeat: int = 1
    also: tuple[str, ...] = ()


class QuantMethod(ABC):
    """Makes and runs the weights of linear layers. Constructed once per model."""

    @classmethod
    @abstractmethod
    def recognises(cls, quantization_config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint's ``quantization_config`` is of this format.

        Phase: resolve. Order: 1. Times: once, if the checkpoint is quantized. May raise: nothing.
        """
        ...

    @abstractmethod
    def __init__(self, quantization_config: Mapping[str, Any] | None) -> None:
        """Prepare for a checkpoint's format, or for quantizing on load.

        Phase: load. Order: 1. Times: once. May raise: ConfigError.

        Args:
            quantization_config: the checkpoint's section, or None to quantize an unquantized checkpoint on load.

        Raises:
            ConfigError: the section asks for something this method cannot do.
        """
        ...

    @abstractmethod
    def applies_to(self, layer: str) -> bool:
        """Whether the layer of this dotted name is quantized; the others keep plain weights.

        Phase: load. Order: 2. Times: per linear layer. May raise: ConfigError.
        """
        ...

    @abstractmethod
    def tensors(self, in_features: int, out_features: int, dtype: torch.dtype) -> Mapping[str, TensorSpec]:
        """What a layer expects from the checkpoint, by the suffix of the tensor's name (``weight``, ``scale``, …).

        A size that the format cannot hold is refused by name; multiples of 32 never are.

        Phase: load. Order: 3. Times: per linear layer. May raise: ConfigError.
        """
        ...

    @abstractmethod
    def prepare(self, tensors: Mapping[str, Tensor], ops: OpTable, dtype: torch.dtype) -> PackedLinear:
        """Bring one layer's loaded tensors into final form; called once per layer, after which they are freed.

        Phase: load. Order: 4. Times: per linear layer, as soon as its tensors are there. May raise: ConfigError.
        """
        ...

    @abstractmethod
    def apply(self, x_TI: Tensor, packed: PackedLinear, bias_O: Tensor | None, ops: OpTable) -> Tensor:
        """``x @ weightᵀ + bias`` in the dtype of ``x``, shape ``[T, O]``; rows do not affect each other.

        Phase: step. Order: 1. Times: per linear layer. May raise: nothing.
        """
        ...

    def row_product(self) -> RowProduct | None:
        """The product with activations that are quantized already, or None if layers take wide ones alone.

        A method whose ``apply`` begins with ``quantize_rows`` gives the rest of it here. A norm or activation before
        the layer may then quantize what it has just computed, which saves writing and reading it wide.
        """
        return None

    def prepare_experts(
        self, experts: Iterable[Mapping[str, Tensor]], ops: OpTable, dtype: torch.dtype
    ) -> PackedLinear:
        """Bring one projection of a mixture's experts into final form: in the place of ``prepare``, which by default is
        called for each.

        Args:
            experts: each one's loaded tensors, in order; an expert is as tall as its merged parts together.
        """
        return [self.prepare(tensors, ops, dtype) for tensors in experts]

    def apply_experts(self, x_NI: Tensor, packed: PackedLinear, starts_E1: Tensor, ops: OpTable) -> Tensor:
        """Products ``[N, O]`` of rows that are sorted by expert, each with its own expert.

        The default calls ``apply`` once per expert that has rows, for which it waits until the device says how many. A
        format with an operation over all experts overrides this and ``prepare_experts``; where a platform's steps may
        not wait, or have static shapes, it must.

        Args:
            packed: from ``prepare_experts``.
            starts_E1: int64 ``[E + 1]`` on the device: expert e has the rows ``starts[e] : starts[e + 1]``.
        """
        starts = starts_E1.tolist()
        spans = [span for span in zip(packed, starts[:-1], starts[1:], strict=True) if span[1] < span[2]]
        spans = spans or [(packed[0], 0, 0)]
        return torch.cat([self.apply(x_NI[start:end], own, None, ops) for own, start, end in spans])
