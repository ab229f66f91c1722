"""The suite that every speculative decoder passes."""

from dovetail.testing.conformance import PluginSuite, SpecDecoderSuite, registered


class TestSuffix(SpecDecoderSuite):
    subject = registered("suffix")


class TestPlugin(PluginSuite):
    plugin = "suffix"
