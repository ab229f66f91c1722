"""What this distribution registers. Imports nothing heavy."""

from collections.abc import Callable

from dovetail import hookimpl
from dovetail.plugins.manifest import SpecDecoderManifest


@hookimpl
def dovetail_register_spec_decoders(register: Callable[[SpecDecoderManifest, str], None]) -> None:
    """Called once, when plugins are discovered."""
    manifest = SpecDecoderManifest(
        name="sketch",
        summary="Continues as an earlier occurrence of the last tokens did.",
        defaults={"num_speculative_tokens": 4, "match": 2},
    )
    register(manifest, "dovetail_sketch.decoder:SketchDecoder")
