"""Which suites test what a plugin registers."""

from __future__ import annotations

from dovetail.testing.conformance.suite import Suite

SUITES: dict[str, tuple[type[Suite], ...]] = {}
"""By field of :class:`~dovetail.plugins.registry.Registries`."""
