"""What every speculative decoder does."""

from dovetail.testing.conformance import SpecDecoderSuite, registered


class TestDecoder(SpecDecoderSuite):
    subject = registered("sketch")
