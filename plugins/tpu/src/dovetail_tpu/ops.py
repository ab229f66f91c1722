"""The operations that the platform overrides: those that depend on data, which programs cannot, and those it has
kernels for. XLA fuses the others' references.

On tensors of a program they become part of it; on tensors of the host they run as programs of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dovetail_tpu import experts, gates, linear, norms, quantized, sampling, vocabulary


def table() -> Mapping[str, Callable[..., Any]]:
    """Overrides for :class:`dovetail.contracts.ops.OpTable`, which are the same in each dtype."""
    return {
        "embedding": vocabulary.embedding,
        "linear": linear.linear,
        "rms_norm": norms.rms_norm,
        "add_rms_norm": norms.add_rms_norm,
        "add_rms_norm_quantize": norms.add_rms_norm_quantize,
        "silu_and_mul": gates.silu_and_mul,
        "gelu_tanh_and_mul": gates.gelu_tanh_and_mul,
        "linear_silu_and_mul": gates.linear_silu_and_mul,
        "weight_only_pack": quantized.weight_only_pack,
        "weight_only_mm": quantized.weight_only_mm,
        "scaled_mm_pack": quantized.scaled_mm_pack,
        "scaled_mm": quantized.scaled_mm,
        "block_scaled_pack": quantized.block_scaled_pack,
        "block_scaled_mm": quantized.block_scaled_mm,
        "w4a16_mm": quantized.w4a16_mm,
        "choose_experts": experts.choose_experts,
        "experts_pack": experts.experts_pack,
        "moe_experts": experts.moe_experts,
        "quantized_experts_pack": quantized.quantized_experts_pack,
        "quantized_experts_mm": quantized.quantized_experts_mm,
        "sample": sampling.sample,
        "filter_logits": sampling.filter_logits,
        "sample_residual": sampling.sample_residual,
        "top_logprobs": sampling.top_logprobs,
    }
