"""What this distribution registers. Imports nothing heavy."""

from __future__ import annotations

from dovetail.hookspecs import Register, hookimpl
from dovetail.plugins.manifest import SpecDecoderManifest

NGRAM = SpecDecoderManifest(
    name="ngram",
    summary="Continues as the last tokens did where they stood before in the same request (prompt lookup).",
    defaults={"num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 4},
)
DRAFT_MODEL = SpecDecoderManifest(
    name="draft_model",
    summary="Drafts with a smaller model of the same vocabulary.",
    needs_draft_model=True,
    probabilities=True,
    defaults={"num_speculative_tokens": 4, "sampling": "coupled"},
)


@hookimpl
def dovetail_register_spec_decoders(register: Register[SpecDecoderManifest]) -> None:
    """One entry per way of drafting."""
    register(NGRAM, "dovetail_specdec.ngram:NgramDecoder")
    register(DRAFT_MODEL, "dovetail_specdec.draft_model:DraftModelDecoder")
