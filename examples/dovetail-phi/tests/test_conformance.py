"""The suite that every model family passes; it compares with transformers, which knows this one."""

from dovetail.testing.conformance import ModelSuite, registered


class TestPhi(ModelSuite):
    subject = registered("phi")
