"""What every attention backend does."""

from dovetail.testing.conformance import AttentionSuite, PluginSuite, registered


class TestAttention(AttentionSuite):
    subject = registered("sketch")


class TestPlugin(PluginSuite):
    plugin = "sketch"
