"""The suites that every platform and every attention backend passes."""

from dovetail.testing.conformance import AttentionSuite, OpsSuite, PlatformSuite, PluginSuite, registered


class TestPlatform(PlatformSuite):
    subject = registered("abacus")


class TestOps(OpsSuite):
    subject = registered("abacus")


class TestAttention(AttentionSuite):
    subject = registered("abacus")


class TestPlugin(PluginSuite):
    plugin = "abacus"
