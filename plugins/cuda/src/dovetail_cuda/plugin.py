"""What dovetail-cuda registers. Imports nothing heavy."""

from __future__ import annotations

from dovetail.hookspecs import Register, hookimpl
from dovetail.plugins.manifest import AttentionManifest, PlatformManifest

DTYPES = ("bfloat16", "float16", "float32")
TRITON = ("triton>=3.6",)
"""Not a dependency: builds of torch for CUDA bring the release that fits them."""
CUDNN = (*TRITON, "nvidia-cudnn-frontend>=1.24")
"""An extra; cuDNN itself comes with torch."""
OPS = frozenset(
    {
        "rms_norm",
        "add_rms_norm",
        "add_rms_norm_quantize",
        "rotary",
        "silu_and_mul",
        "silu_and_mul_quantize",
        "gelu_tanh_and_mul",
        "linear",
        "linear_silu_and_mul",
        "choose_experts",
        "experts_pack",
        "moe_experts",
        "write_kv",
        "paged_attention",
        "penalize",
        "sample",
        "filter_logits",
        "sample_residual",
        "top_logprobs",
        "quantize_rows",
        "weight_only_pack",
        "weight_only_mm",
        "scaled_mm_pack",
        "scaled_mm",
        "block_scaled_pack",
        "block_scaled_mm",
        "w4a16_mm",
        "quantized_experts_pack",
        "quantized_experts_mm",
    }
)
"""Operations that have a kernel, or a form that does not wait for the device."""


@hookimpl
def dovetail_register_platforms(register: Register[PlatformManifest]) -> None:
    """One GPU of this machine."""
    register(
        PlatformManifest(
            name="cuda",
            summary="NVIDIA GPUs through CUDA.",
            priority=100,
            requires=TRITON,
            device_type="cuda",
            dtypes=DTYPES,
            attention=("triton", "cudnn"),  # the faster first, as the README's table has them
            ops=OPS,
            asynchronous=True,
        ),
        "dovetail_cuda.platform:CudaPlatform",
    )


@hookimpl
def dovetail_register_attention_backends(register: Register[AttentionManifest]) -> None:
    """Attention in Triton, and through NVIDIA's library."""
    register(
        AttentionManifest(
            name="triton",
            summary="Paged attention in Triton; heads that share keys and values read them once.",
            requires=TRITON,
            device_types=("cuda",),
            dtypes=DTYPES,
            kv_dtypes=("auto", "float8_e4m3fn"),
            sliding_window=True,
            soft_cap=True,
            verify=True,
        ),
        "dovetail_cuda.attention:TritonAttention",
    )
    register(
        AttentionManifest(
            name="cudnn",
            summary="Paged attention through NVIDIA's library, cuDNN; needs its Python package.",
            requires=CUDNN,
            extra="cudnn",
            device_types=("cuda",),
            dtypes=("bfloat16", "float16"),
            head_sizes=(32, 64, 80, 96, 112, 128, 192, 256),
            block_sizes=(1, 2, 4, 8, 16, 32, 64, 128),
            sliding_window=True,
            verify=True,
        ),
        "dovetail_cuda.cudnn_attention:CudnnAttention",
    )
