"""What this distribution registers. Imports nothing heavy."""

from collections.abc import Callable

from dovetail import hookimpl
from dovetail.plugins.manifest import AttentionManifest, PlatformManifest


@hookimpl
def dovetail_register_platforms(register: Callable[[PlatformManifest, str], None]) -> None:
    """The chip."""
    manifest = PlatformManifest(
        name="abacus",
        summary="Beads on rods: a device of its own, emulated on the host.",
        priority=-10,  # auto takes it only where nothing better is available
        device_type="abacus",
        dtypes=("float32", "bfloat16"),
        attention=("abacus",),
        ops=frozenset({"rms_norm", "add_rms_norm", "silu_and_mul", "linear_pack", "linear", "embedding"}),
    )
    register(manifest, "dovetail_abacus.platform:AbacusPlatform")


@hookimpl
def dovetail_register_attention_backends(register: Callable[[AttentionManifest, str], None]) -> None:
    """Attention for its device type, which no other backend knows."""
    manifest = AttentionManifest(
        name="abacus",
        summary="Pages with tokens along the rods; every shape is known from the bucket.",
        device_types=("abacus",),
        dtypes=("float32", "bfloat16"),
        sliding_window=True,
        soft_cap=True,
        verify=True,
    )
    register(manifest, "dovetail_abacus.attention:AbacusAttention")
