"""Our own attention backends, in the public form."""

from dovetail.testing.conformance import AttentionSuite, registered


class TestCpu(AttentionSuite):
    subject = registered("cpu")


class TestBlocked(AttentionSuite):
    subject = registered("blocked")


class TestReference(AttentionSuite):
    subject = registered("reference")
