"""The operations that the platform has kernels for; products of plain weights with many tokens stay torch's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dovetail_cuda import quantized
from dovetail_cuda.kernels.activation import gelu_tanh_and_mul, silu_and_mul, silu_and_mul_quantize
from dovetail_cuda.kernels.attention import paged_attention
from dovetail_cuda.kernels.cache import write_kv
from dovetail_cuda.kernels.experts import experts_pack, moe_experts
from dovetail_cuda.kernels.filtering import filter_logits
from dovetail_cuda.kernels.linear import linear, linear_silu_and_mul
from dovetail_cuda.kernels.logprobs import top_logprobs
from dovetail_cuda.kernels.norm import add_rms_norm, add_rms_norm_quantize, rms_norm
from dovetail_cuda.kernels.penalties import penalize
from dovetail_cuda.kernels.residual import sample_residual
from dovetail_cuda.kernels.rotary import rotary
from dovetail_cuda.kernels.routing import choose_experts
from dovetail_cuda.kernels.sampling import sample


def table() -> Mapping[str, Callable[..., Any]]:
    """The overrides of the op table, which are the same in each dtype."""
    return {
        "rms_norm": rms_norm,
        "add_rms_norm": add_rms_norm,
        "add_rms_norm_quantize": add_rms_norm_quantize,
        "rotary": rotary,
        "silu_and_mul": silu_and_mul,
        "silu_and_mul_quantize": silu_and_mul_quantize,
        "gelu_tanh_and_mul": gelu_tanh_and_mul,
        "linear": linear,
        "linear_silu_and_mul": linear_silu_and_mul,
        "choose_experts": choose_experts,
        "experts_pack": experts_pack,
        "moe_experts": moe_experts,
        "write_kv": write_kv,
        "paged_attention": paged_attention,
        "penalize": penalize,
        "sample": sample,
        "filter_logits": filter_logits,
        "sample_residual": sample_residual,
        "top_logprobs": top_logprobs,
        **quantized.table(),
    }
