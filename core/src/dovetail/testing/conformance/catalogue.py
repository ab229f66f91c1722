"""Which suites test what a plugin registers."""

from __future__ import annotations

from dovetail.testing.conformance.attention import AttentionSuite
from dovetail.testing.conformance.command import CommandSuite
from dovetail.testing.conformance.discovery import PluginSuite
from dovetail.testing.conformance.executor import ExecutorSuite
from dovetail.testing.conformance.model import ModelSuite
from dovetail.testing.conformance.ops import OpsSuite
from dovetail.testing.conformance.platform import PlatformSuite
from dovetail.testing.conformance.quant import QuantSuite
from dovetail.testing.conformance.specdec import SpecDecoderSuite
from dovetail.testing.conformance.suite import Suite

SUITES: dict[str, tuple[type[Suite], ...]] = {
    "platforms": (PlatformSuite, OpsSuite),
    "attention": (AttentionSuite,),
    "models": (ModelSuite,),
    "quant": (QuantSuite,),
    "spec_decoders": (SpecDecoderSuite,),
    "commands": (CommandSuite,),
}
"""By field of :class:`~dovetail.plugins.registry.Registries`."""

ALL: tuple[type[Suite], ...] = (*(suite for suites in SUITES.values() for suite in suites), PluginSuite, ExecutorSuite)
"""Every suite, those of what no plugin registers included, and of plugins themselves."""
