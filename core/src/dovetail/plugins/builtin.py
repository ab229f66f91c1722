"""The core's own plugin: the reference platform, its attention backends, and plain weights."""

from __future__ import annotations

from dovetail.cli.commands import COMMANDS
from dovetail.hookspecs import Register, hookimpl
from dovetail.plugins.manifest import AttentionManifest, CommandManifest, PlatformManifest, QuantManifest

OPS = frozenset(
    {"rms_norm", "add_rms_norm", "rotary", "silu_and_mul", "linear_pack", "linear", "embedding", "sample"}
    | {"gelu_tanh_and_mul", "experts_pack", "moe_experts"}
    | {"quantize_rows", "weight_only_pack", "weight_only_mm", "scaled_mm_pack", "scaled_mm"}
    | {"block_scaled_pack", "block_scaled_mm"}
)
"""Operations that the reference platform overrides."""


@hookimpl
def dovetail_register_platforms(register: Register[PlatformManifest]) -> None:
    """The host's own processor: available everywhere, and the oracle for every other platform."""
    register(
        PlatformManifest(
            name="cpu",
            summary="The host's processor; the reference platform.",
            device_type="cpu",
            dtypes=("bfloat16", "float32"),
            attention=("cpu", "blocked", "reference"),
            ops=OPS,
        ),
        "dovetail.platforms.cpu.platform:CpuPlatform",
    )


@hookimpl
def dovetail_register_attention_backends(register: Register[AttentionManifest]) -> None:
    """The fast backend of the reference platform, a portable one, and the oracle."""
    register(
        AttentionManifest(
            name="cpu",
            summary="Paged attention of the reference platform.",
            device_types=("cpu",),
            dtypes=("bfloat16", "float32"),
            block_sizes=tuple(range(16, 513, 16)),
            sliding_window=True,
            soft_cap=True,
            verify=True,
        ),
        "dovetail.platforms.cpu.attention:CpuAttention",
    )
    register(
        AttentionManifest(
            name="blocked",
            summary="Tiles of plain torch: any CPU and page size, and a KV cache in narrower dtypes.",
            priority=-50,
            device_types=("cpu",),
            dtypes=("bfloat16", "float16", "float32"),
            kv_dtypes=("auto", "bfloat16", "float16", "float32", "float8_e4m3fn"),
            sliding_window=True,
            soft_cap=True,
            verify=True,
        ),
        "dovetail.platforms.cpu.blocked_attention:BlockedAttention",
    )
    register(
        AttentionManifest(
            name="reference",
            summary="Plain and readable: the oracle for every other backend.",
            priority=-100,
            device_types=("cpu",),
            dtypes=("bfloat16", "float16", "float32"),
            sliding_window=True,
            soft_cap=True,
            verify=True,
        ),
        "dovetail.platforms.cpu.reference_attention:ReferenceAttention",
    )


@hookimpl
def dovetail_register_quant_methods(register: Register[QuantManifest]) -> None:
    """Weights as they are."""
    register(
        QuantManifest(name="none", summary="Plain weights, in the activation dtype.", priority=-100, experts=True),
        "dovetail.layers.linear:Unquantized",
    )


@hookimpl
def dovetail_register_commands(register: Register[CommandManifest]) -> None:
    """The core's commands, so that no plugin takes a name of theirs."""
    for name, (target, summary) in COMMANDS.items():
        register(CommandManifest(name=name, summary=summary), target)
