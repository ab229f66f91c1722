"""What every command does."""

from dovetail.testing.conformance import CommandSuite, PluginSuite, registered


class TestCommand(CommandSuite):
    subject = registered("sketch")


class TestPlugin(PluginSuite):
    plugin = "sketch"
