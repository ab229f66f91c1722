"""What dovetail-tpu registers. Imports nothing heavy."""

from __future__ import annotations

from dovetail.hookspecs import Register, hookimpl
from dovetail.plugins.manifest import AttentionManifest, CommandManifest, PlatformManifest
from dovetail_tpu import detect

DTYPES = ("bfloat16", "float32")
KV_DTYPES = ("auto", "float8_e4m3fn", "int8")
OPS = frozenset(
    {
        "embedding",
        "linear",
        "rms_norm",
        "add_rms_norm",
        "add_rms_norm_quantize",
        "silu_and_mul",
        "gelu_tanh_and_mul",
        "linear_silu_and_mul",
        "weight_only_pack",
        "weight_only_mm",
        "scaled_mm_pack",
        "scaled_mm",
        "block_scaled_pack",
        "block_scaled_mm",
        "w4a16_mm",
        "choose_experts",
        "experts_pack",
        "moe_experts",
        "quantized_experts_pack",
        "quantized_experts_mm",
        "sample",
        "filter_logits",
        "sample_residual",
        "top_logprobs",
    }
)
PREFERRED, EXPLICIT = 90, -90
"""Without a chip the platform is chosen by name alone, even where its programs could execute on the host."""


@hookimpl
def dovetail_register_platforms(register: Register[PlatformManifest]) -> None:
    """The chips of this machine."""
    register(
        PlatformManifest(
            name="tpu",
            summary="Cloud TPUs, by programs that XLA compiles ahead.",
            priority=PREFERRED if detect.chips() else EXPLICIT,
            device_type="cpu",  # of what code outside of compiled steps touches
            dtypes=DTYPES,
            attention=("tpu", "tpu-gather"),
            ops=OPS,
            defaults={"bridge": "auto", "devices": "auto"},
        ),
        "dovetail_tpu.platform:TpuPlatform",
    )


@hookimpl
def dovetail_register_attention_backends(register: Register[AttentionManifest]) -> None:
    """Attention in Pallas, and in plain XLA."""
    for name, summary, target in (
        ("tpu", "Ragged paged attention in Pallas, for programs of the platform 'tpu'.", "TpuAttention"),
        ("tpu-gather", "The same in plain XLA: slow, to compare with.", "TpuGatherAttention"),
    ):
        register(
            AttentionManifest(
                name=name,
                summary=summary,
                priority=EXPLICIT,
                device_types=("cpu",),
                dtypes=DTYPES,
                kv_dtypes=KV_DTYPES,
                sliding_window=True,
                soft_cap=True,
                verify=True,
            ),
            f"dovetail_tpu.attention:{target}",
        )


@hookimpl
def dovetail_register_commands(register: Register[CommandManifest]) -> None:
    """What is asked before chips are rented."""
    register(
        CommandManifest(name="plan", summary="Say whether a model fits on a TPU slice, without one."),
        "dovetail_tpu.plan:command",
    )
