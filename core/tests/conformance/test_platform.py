"""Our own platforms, in the public form."""

from dovetail.plugins.manifest import PlatformManifest
from dovetail.testing.conformance import PlatformSuite, registered, unregistered
from dovetail.testing.platforms import LadderPlatform, ReferencePlatform, WholePlatform


def manifest(name: str) -> PlatformManifest:
    return PlatformManifest(
        name=name, summary="For tests.", device_type="cpu", dtypes=("float32",), attention=("reference", "blocked")
    )


class TestCpu(PlatformSuite):
    subject = registered("cpu")


class TestReference(PlatformSuite):
    subject = unregistered(ReferencePlatform, manifest("reference-ops"))


class TestLadder(PlatformSuite):
    subject = unregistered(LadderPlatform, manifest("ladder"))


class TestWhole(PlatformSuite):
    subject = unregistered(WholePlatform, manifest("whole"))
