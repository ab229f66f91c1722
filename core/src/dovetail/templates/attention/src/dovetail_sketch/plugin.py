"""What this distribution registers. Imports nothing heavy."""

from collections.abc import Callable

from dovetail import hookimpl
from dovetail.plugins.manifest import AttentionManifest


@hookimpl
def dovetail_register_attention_backends(register: Callable[[AttentionManifest, str], None]) -> None:
    """Called once, when plugins are discovered."""
    manifest = AttentionManifest(
        name="sketch",
        summary="Pages gathered for torch's attention.",
        device_types=("cpu",),
        dtypes=("bfloat16", "float32"),
        sliding_window=True,
        verify=True,  # several query tokens per request: causal within a request, so nothing special is needed
    )
    register(manifest, "dovetail_sketch.attention:SketchAttention")
