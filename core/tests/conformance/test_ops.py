"""The operations of our own platforms, in the public form, and that the suite leaves none out."""

from dovetail.contracts.ops import OpTable
from dovetail.plugins.manifest import PlatformManifest
from dovetail.testing.conformance import OpsSuite, registered, unregistered
from dovetail.testing.conformance.ops import covered
from dovetail.testing.platforms import ReferencePlatform

REFERENCE = PlatformManifest(
    name="reference-ops",
    summary="Overrides nothing.",
    device_type="cpu",
    dtypes=("float32", "bfloat16"),
    attention=("reference",),
)


class TestCpu(OpsSuite):
    subject = registered("cpu")


class TestReference(OpsSuite):
    subject = unregistered(ReferencePlatform, REFERENCE)


def test_every_operation_has_a_scenario():
    assert covered(OpsSuite) == OpTable.names()
