"""What dovetail-tpu registers. Imports nothing heavy."""

from __future__ import annotations

from dovetail.hookspecs import Register, hookimpl
from dovetail.plugins.manifest import AttentionManifest, PlatformManifest
from dovetail_tpu import detect

DTYPES = ("bfloat16", "float32")
KV_DTYPES = ("auto", "float8_e4m3fn")
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
