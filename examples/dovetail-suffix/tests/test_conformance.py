"""The suite that every speculative decoder passes."""

from dovetail.testing.conformance import SpecDecoderSuite, registered


class TestSuffix(SpecDecoderSuite):
    subject = registered("suffix")
