"""The op table: named operations with a reference implementation each, which a platform may override.

The table is resolved once, when the model is built; nothing looks an operation up by name afterwards. Signatures and
meaning of every operation are those of the function of the same name in :mod:`dovetail.ops.reference`; an override
must agree with it within the dtype's rounding, which the conformance tests check against float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from dovetail.errors import PluginLoadError
from dovetail.ops import reference

PackedWeight = Any
"""Whatever ``linear_pack`` returns. The ``linear`` of the same table reads it, and so does an ``embedding`` that is
not the reference: a large table tied to the head is kept in this form only. What ``weight_only_pack``,
``scaled_mm_pack`` and ``block_scaled_pack`` return is read by the product of the same name alone."""

PackedExperts = Any
"""Whatever ``experts_pack`` returns; the ``moe_experts`` of the same table reads it. So it is with
``quantized_experts_pack`` and ``quantized_experts_mm``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpTable:
    """The operations of one engine. Fields default to the reference implementations."""

    rms_norm: Callable[..., Tensor] = reference.rms_norm
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]] = reference.add_rms_norm
    add_rms_norm_quantize: Callable[..., tuple[Tensor, Tensor, Tensor]] = reference.add_rms_norm_quantize
    rotary: Callable[..., tuple[Tensor, Tensor]] = reference.rotary
    silu_and_mul: Callable[..., Tensor] = reference.silu_and_mul
    silu_and_mul_quantize: Callable[..., tuple[Tensor, Tensor]] = reference.silu_and_mul_quantize
    gelu_tanh_and_mul: Callable[..., Tensor] = reference.gelu_tanh_and_mul
    embedding: Callable[..., Tensor] = reference.embedding
    linear_pack: Callable[..., PackedWeight] = reference.linear_pack
    linear: Callable[..., Tensor] = reference.linear
    linear_silu_and_mul: Callable[..., Tensor] = reference.linear_silu_and_mul
    quantize_rows: Callable[..., tuple[Tensor, Tensor]] = reference.quantize_rows
    weight_only_pack: Callable[..., PackedWeight] = reference.weight_only_pack
    weight_only_mm: Callable[..., Tensor] = reference.weight_only_mm
    scaled_mm_pack: Callable[..., PackedWeight] = reference.scaled_mm_pack
    scaled_mm: Callable[..., Tensor] = reference.scaled_mm
    block_scaled_pack: Callable[..., PackedWeight] = reference.block_scaled_pack
    block_scaled_mm: Callable[..., Tensor] = reference.block_scaled_mm
    w4a16_mm: Callable[..., Tensor] = reference.w4a16_mm
    choose_experts: Callable[..., tuple[Tensor, Tensor]] = reference.choose_experts
    experts_pack: Callable[..., PackedExperts] = reference.experts_pack
    moe_experts: Callable[..., Tensor] = reference.moe_experts
    quantized_experts_pack: Callable[..., PackedExperts] = reference.quantized_experts_pack
    quantized_experts_mm: Callable[..., Tensor] = reference.quantized_experts_mm
    write_kv: Callable[..., None] = reference.write_kv
    paged_attention: Callable[..., Tensor] = reference.paged_attention
    penalize: Callable[..., None] = reference.penalize
    sample: Callable[..., Tensor] = reference.sample
    filter_logits: Callable[..., Tensor] = reference.filter_logits
    sample_residual: Callable[..., Tensor] = reference.sample_residual
    top_logprobs: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = reference.top_logprobs

    def __post_init__(self) -> None:
        """Compose what is a sequence of others of those of this table, unless it is overridden itself."""
        for name, sequence in (
            ("linear_silu_and_mul", OpTable._linear_then_silu_and_mul),
            ("add_rms_norm_quantize", OpTable._add_rms_norm_then_quantize),
            ("silu_and_mul_quantize", OpTable._silu_and_mul_then_quantize),
        ):
            given = getattr(self, name)
            is_of_another_table = getattr(given, "__func__", None) is sequence
            if given is getattr(reference, name) or is_of_another_table:
                object.__setattr__(self, name, MethodType(sequence, self))

    def _linear_then_silu_and_mul(self, x_TI: Tensor, packed: PackedWeight, bias_O: Tensor | None = None) -> Tensor:
        return self.silu_and_mul(self.linear(x_TI, packed, bias_O))

    def _add_rms_norm_then_quantize(
        self,
        x_TD: Tensor,
        residual_TD: Tensor,
        weight_D: Tensor,
        eps: float,
        dtype: torch.dtype,
        group_size: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        normed_TD, residual_TD = self.add_rms_norm(x_TD, residual_TD, weight_D, eps)
        return *self.quantize_rows(normed_TD, dtype, group_size), residual_TD

    def _silu_and_mul_then_quantize(
        self, x_T2F: Tensor, dtype: torch.dtype, group_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.quantize_rows(self.silu_and_mul(x_T2F), dtype, group_size)

    @classmethod
    def names(cls) -> frozenset[str]:
        """Every operation's name."""
        return frozenset(field.name for field in fields(cls))

    @classmethod
    def resolve(cls, overrides: Mapping[str, Callable[..., Any]], owner: str) -> OpTable:
        """Build the table from a platform's overrides.

        Raises:
            PluginLoadError: ``owner`` overrides an operation that does not exist.
        """
        unknown = sorted(set(overrides) - cls.names())
        if unknown:
            raise PluginLoadError(
                f"{owner} overrides unknown operations {unknown}; known: {', '.join(sorted(cls.names()))}."
            )
        return cls(**overrides)
