"""The suite that every model family passes; it compares with transformers, which knows this one."""

from dovetail.testing.conformance import ModelSuite, PluginSuite, registered


class TestPhi(ModelSuite):
    subject = registered("phi")


class TestPlugin(PluginSuite):
    plugin = "phi"
