"""What every platform and every table of operations does."""

from dovetail.testing.conformance import OpsSuite, PlatformSuite, PluginSuite, registered


class TestPlatform(PlatformSuite):
    subject = registered("sketch")


class TestOps(OpsSuite):
    subject = registered("sketch")


class TestPlugin(PluginSuite):
    plugin = "sketch"
