"""The suites, with programs that execute on the host."""

from dataclasses import replace

import msgspec
import pytest

from dovetail.runner.executor import LocalExecutor
from dovetail.testing.conformance import (
    AttentionSuite,
    ExecutorManifest,
    ExecutorSuite,
    PlatformSuite,
    PluginSuite,
    registered,
    unregistered,
)
from dovetail_tpu import bridges
from dovetail_tpu.platform import TpuPlatform

EXECUTOR = ExecutorManifest(
    name="local",
    summary="One process, one device.",
    checkpoint=True,
    logit_rules=True,
    filters=True,
    logprobs=True,
    prompt_logprobs=True,
    drafts=True,
)


@pytest.fixture(autouse=True)
def bridge(tmp_path_factory):
    """Backends run on the bridge that a platform has opened. Programs that several tests have are compiled once."""
    opened = bridges.open_bridge()
    opened.enable_cache(tmp_path_factory.getbasetemp() / "programs")


class TestPlatform(PlatformSuite):
    """With the attention that is compiled fast."""

    subject = unregistered(
        TpuPlatform, replace(registered("tpu").find("platforms").manifest, attention=("tpu-gather",))
    )

    @pytest.mark.slow
    def test_engine(self, dtype, checkpoint):
        super().test_engine(dtype, checkpoint)

    @pytest.mark.slow
    def test_seeded_engine(self, checkpoint):
        super().test_seeded_engine(checkpoint)


@pytest.mark.slow
class TestWholePlatform(PlatformSuite):
    subject = registered("tpu")


@pytest.mark.slow
class TestAttention(AttentionSuite):
    subject = registered("tpu")


@pytest.mark.slow
class TestGatherAttention(AttentionSuite):
    subject = registered("tpu-gather")


@pytest.mark.slow
class TestExecutor(ExecutorSuite):
    subject = unregistered(LocalExecutor, EXECUTOR)

    def config(self, folder, **choices):
        """On the platform."""
        platform = registered("tpu").find("platforms")
        return msgspec.structs.replace(
            super().config(folder, **choices),
            platform=platform.selection,
            attention=registered("tpu-gather").find("attention").selection,
            platform_options=dict(platform.manifest.defaults),
        )


class TestPlugin(PluginSuite):
    plugin = "tpu"
