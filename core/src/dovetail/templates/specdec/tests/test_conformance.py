"""What every speculative decoder does."""

from dovetail.testing.conformance import PluginSuite, SpecDecoderSuite, registered


class TestDecoder(SpecDecoderSuite):
    subject = registered("sketch")


class TestPlugin(PluginSuite):
    plugin = "sketch"
