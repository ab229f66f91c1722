"""Conformance suites: one per contract, for whoever implements it. Needs pytest: ``dovetail-core[testing]``.

A test file of two statements runs one::

    from dovetail.testing.conformance import AttentionSuite, registered

    class TestMine(AttentionSuite):
        subject = registered("mine")

``dovetail conformance PLUGIN`` runs those of everything that an installed plugin registers.
"""

from __future__ import annotations

from dovetail.testing.conformance.attention import AttentionSuite
from dovetail.testing.conformance.command import CommandSuite
from dovetail.testing.conformance.discovery import PluginSuite
from dovetail.testing.conformance.executor import ExecutorManifest, ExecutorSuite
from dovetail.testing.conformance.model import ModelSuite
from dovetail.testing.conformance.ops import OpsSuite
from dovetail.testing.conformance.platform import PlatformSuite
from dovetail.testing.conformance.quant import QuantSuite
from dovetail.testing.conformance.specdec import SpecDecoderSuite
from dovetail.testing.conformance.subject import Subject, Tested, registered, unregistered
from dovetail.testing.conformance.suite import Scenario, Suite, needs, scenarios

__all__ = [
    "AttentionSuite",
    "CommandSuite",
    "ExecutorManifest",
    "ExecutorSuite",
    "ModelSuite",
    "OpsSuite",
    "PlatformSuite",
    "PluginSuite",
    "QuantSuite",
    "Scenario",
    "SpecDecoderSuite",
    "Subject",
    "Suite",
    "Tested",
    "needs",
    "registered",
    "scenarios",
    "unregistered",
]
