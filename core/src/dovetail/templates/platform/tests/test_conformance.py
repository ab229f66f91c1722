"""What every platform and every table of operations does."""

from dovetail.testing.conformance import OpsSuite, PlatformSuite, registered


class TestPlatform(PlatformSuite):
    subject = registered("sketch")


class TestOps(OpsSuite):
    subject = registered("sketch")
