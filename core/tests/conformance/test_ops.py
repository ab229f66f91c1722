"""The operations of our own platforms, in the public form, and that the suite leaves none out."""

import pytest

from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import PlatformConfig
from dovetail.platforms.cpu import kernels
from dovetail.platforms.cpu.platform import CpuPlatform
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


def cpu_on(isa: str) -> type[CpuPlatform]:
    """The native operations of another instruction set than this machine's best."""

    class OnIsa(CpuPlatform):
        def __init__(self, config: PlatformConfig) -> None:
            super().__init__(config)
            self._kernels = kernels.load_isa(isa)
            self._kernels.set_threads(2)

    return OnIsa


for _isa in kernels.built_isas()[1:]:
    _subject = unregistered(cpu_on(_isa), registered("cpu").find("platforms").manifest)
    _members = {"subject": _subject, "pytestmark": pytest.mark.slow}
    globals()[f"TestCpuOn_{_isa}"] = type(f"TestCpuOn_{_isa}", (OpsSuite,), _members)


def test_every_operation_has_a_scenario():
    assert covered(OpsSuite) == OpTable.names()
