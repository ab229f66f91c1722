"""Runs a suite, or some of its scenarios, on a subject that is broken on purpose."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dovetail.testing.conformance import Subject, Suite
from dovetail.testing.conformance.run import run

Failing = Callable[..., dict[str, str]]
"""Suite, subject and scenario ids in; the failed scenarios and the first message of each out."""


@pytest.fixture(scope="session")
def failing() -> Failing:
    def fail(suite: type[Suite], subject: Subject, *only: str) -> dict[str, str]:
        results = run({"TestMutant": type("TestMutant", (suite,), {"subject": subject})}, only=only)
        assert results, f"no test of {suite.__name__} is about {only}"
        reasons: dict[str, str] = {}
        for result in results:
            if result.outcome == "failed":
                reasons.setdefault(result.scenario, result.reason)
        return reasons

    return fail
