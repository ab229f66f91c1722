"""What this distribution registers. Imports nothing heavy."""

from collections.abc import Callable

from dovetail import hookimpl
from dovetail.plugins.manifest import QuantManifest


@hookimpl
def dovetail_register_quant_methods(register: Callable[[QuantManifest, str], None]) -> None:
    """One format, made on load or read from a checkpoint."""
    manifest = QuantManifest(
        name="nibble",
        summary="4-bit weights with one scale per group of input features.",
        checkpoint_methods=("nibble",),
        on_load=True,
        ops=frozenset({"w4a16_mm"}),
        error=0.1,
    )
    register(manifest, "dovetail_nibble.method:Nibble")
