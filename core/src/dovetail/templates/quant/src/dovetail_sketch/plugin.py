"""What this distribution registers. Imports nothing heavy."""

from collections.abc import Callable

from dovetail import hookimpl
from dovetail.plugins.manifest import QuantManifest


@hookimpl
def dovetail_register_quant_methods(register: Callable[[QuantManifest, str], None]) -> None:
    """Called once, when plugins are discovered."""
    manifest = QuantManifest(
        name="sketch",
        summary="int8 weights with one scale per output feature.",
        checkpoint_methods=("sketch",),
        on_load=True,
        experts=True,
        error=0.012,
    )
    register(manifest, "dovetail_sketch.method:SketchMethod")
