"""What every attention backend does."""

from dovetail.testing.conformance import AttentionSuite, registered


class TestAttention(AttentionSuite):
    subject = registered("sketch")
