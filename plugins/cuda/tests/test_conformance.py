"""The suites on a GPU; without one, all but the probe says that it is lacking."""

import msgspec
import pytest

from dovetail.plugins.requirements import explain_unmet
from dovetail.runner.executor import LocalExecutor
from dovetail.testing.conformance import (
    AttentionSuite,
    ExecutorManifest,
    ExecutorSuite,
    OpsSuite,
    PlatformSuite,
    PluginSuite,
    registered,
    unregistered,
)
from dovetail_cuda.platform import CudaPlatform
from dovetail_cuda.plugin import CUDNN

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
needs_gpu = pytest.mark.skipif(not CudaPlatform.probe().available, reason="lacks a GPU")


class TestPlatform(PlatformSuite):
    subject = registered("cuda")


@needs_gpu
class TestOps(OpsSuite):
    subject = registered("cuda")


@needs_gpu
class TestAttention(AttentionSuite):
    subject = registered("triton")


if not explain_unmet(CUDNN):  # the suite imports what it tests

    @needs_gpu
    class TestCudnnAttention(AttentionSuite):
        subject = registered("cudnn")


@needs_gpu
class TestExecutor(ExecutorSuite):
    subject = unregistered(LocalExecutor, EXECUTOR)

    def config(self, folder, **choices):
        """On the GPU."""
        platform = registered("cuda").find("platforms")
        return msgspec.structs.replace(
            super().config(folder, **choices),
            platform=platform.selection,
            attention=registered("triton").find("attention").selection,
            platform_options=dict(platform.manifest.defaults),
        )


class TestPlugin(PluginSuite):
    plugin = "cuda"
