"""Our own attention backends, in the public form, and the parts of them that a CPU or a context seldom uses."""

from dataclasses import replace
from typing import Any

import pytest

from dovetail.platforms.cpu import kernels
from dovetail.platforms.cpu.attention import CpuAttention
from dovetail.platforms.cpu.blocked_attention import BlockedAttention
from dovetail.testing.conformance import AttentionSuite, registered, unregistered


class TestCpu(AttentionSuite):
    subject = registered("cpu")


class TestBlocked(AttentionSuite):
    subject = registered("blocked")


class TestReference(AttentionSuite):
    subject = registered("reference")


class SmallSpans(BlockedAttention):
    """Takes several turns even for short contexts."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._span_pages = 2


class TestBlockedInSmallSpans(AttentionSuite):
    manifest_of_blocked = registered("blocked").find("attention").manifest
    subject = unregistered(SmallSpans, replace(manifest_of_blocked, dtypes=("float32",)))


def cpu_on(isa: str) -> type[CpuAttention]:
    """The native backend with the kernels of another instruction set than this machine's best."""

    class OnIsa(CpuAttention):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self._attend = kernels.load_isa(isa).library.dovetail_attention

    return OnIsa


for _isa in kernels.built_isas()[1:]:
    _subject = unregistered(cpu_on(_isa), registered("cpu").find("attention").manifest)
    _members = {"subject": _subject, "pytestmark": pytest.mark.slow}
    globals()[f"TestCpuOn_{_isa}"] = type(f"TestCpuOn_{_isa}", (AttentionSuite,), _members)
