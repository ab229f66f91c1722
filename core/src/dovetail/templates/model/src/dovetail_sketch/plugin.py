"""What this distribution registers. Imports nothing heavy."""

from collections.abc import Callable

from dovetail import hookimpl
from dovetail.plugins.manifest import ModelManifest


@hookimpl
def dovetail_register_models(register: Callable[[ModelManifest, str], None]) -> None:
    """Called once, when plugins are discovered."""
    manifest = ModelManifest(
        name="sketch",
        summary="A small decoder to start from.",
        architectures=("SketchForCausalLM",),  # as config.json names it
    )
    register(manifest, "dovetail_sketch.model:SketchModel")
