"""What this distribution registers. Imports nothing heavy."""

from collections.abc import Callable

from dovetail import hookimpl
from dovetail.plugins.manifest import PlatformManifest


@hookimpl
def dovetail_register_platforms(register: Callable[[PlatformManifest, str], None]) -> None:
    """Called once, when plugins are discovered."""
    manifest = PlatformManifest(
        name="sketch",
        summary="The host's processor under another name.",
        priority=-10,  # auto takes it only where nothing better is available
        device_type="cpu",
        dtypes=("float32",),
        attention=("reference",),
        ops=frozenset({"silu_and_mul"}),
    )
    register(manifest, "dovetail_sketch.platform:SketchPlatform")
