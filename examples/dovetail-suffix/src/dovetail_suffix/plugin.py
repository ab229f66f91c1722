"""What this distribution registers. Imports nothing heavy."""

from collections.abc import Callable

from dovetail import hookimpl
from dovetail.plugins.manifest import SpecDecoderManifest


@hookimpl
def dovetail_register_spec_decoders(register: Callable[[SpecDecoderManifest, str], None]) -> None:
    """One method."""
    manifest = SpecDecoderManifest(
        name="suffix",
        summary="Continues as the longest repeated suffix did before.",
        defaults={"num_speculative_tokens": 8, "min_match": 2},
    )
    register(manifest, "dovetail_suffix.decoder:SuffixDecoder")
