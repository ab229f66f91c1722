"""Our speculative decoders, in the public form."""

from __future__ import annotations

from dovetail.testing.conformance import PluginSuite, SpecDecoderSuite, registered

REJECTION = {"sampling": "rejection"}


class TestNgram(SpecDecoderSuite):
    subject = registered("ngram")


class TestDraftModel(SpecDecoderSuite):
    subject = registered("draft_model")


class TestDraftModelWithProbabilities(SpecDecoderSuite):
    subject = registered("draft_model")
    options = REJECTION


class TestPlugin(PluginSuite):
    plugin = "specdec"
