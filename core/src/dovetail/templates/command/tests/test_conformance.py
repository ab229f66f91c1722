"""What every command does."""

from dovetail.testing.conformance import CommandSuite, registered


class TestCommand(CommandSuite):
    subject = registered("sketch")
