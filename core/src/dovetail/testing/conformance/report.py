"""What came of a conformance run, as messages that reports are made of."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

UNAVAILABLE = "not available here: "
"""How the reason of a skip begins where the machine lacks the device."""
OUTCOMES = ("failed", "passed", "skipped")
"""In the order in which one of several outcomes decides."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One test.

    Attributes:
        suite: name of the test class.
        scenario: its id, e.g. ``"attention.4"``.
        behaviour: what the scenario requires.
        test: name of the test with its parameters.
        outcome: one of :data:`OUTCOMES`.
        reason: the message of a failure, or the capability that is lacking.
        details: the whole failure, as pytest shows it.
        seconds: that it took.
    """

    suite: str
    scenario: str
    behaviour: str
    test: str
    outcome: str
    reason: str = ""
    details: str = ""
    seconds: float = 0.0


class ScenarioResult(msgspec.Struct, frozen=True, kw_only=True):
    """All tests of one scenario.

    Attributes:
        tests: they failed if one of them did, and passed if one did and none failed.
    """

    scenario: str
    behaviour: str
    outcome: str
    reasons: tuple[str, ...]
    seconds: float
    tests: tuple[Result, ...]


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One registered thing, and the scenarios of its contract.

    Attributes:
        kind: the noun, e.g. ``"attention"``.
        name: as registered.
        problem: why it could not be tested at all: it cannot be imported, or is not available here.
    """

    kind: str
    name: str
    problem: str
    scenarios: tuple[ScenarioResult, ...]

    def count(self, outcome: str) -> int:
        """Scenarios with this outcome."""
        return sum(scenario.outcome == outcome for scenario in self.scenarios)

    @property
    def conforms(self) -> bool:
        """Whether it was tested and nothing failed."""
        return not self.problem and not self.count("failed")


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A plugin's conformance.

    Attributes:
        plugin, distribution, version: what was tested.
        core: version of ``dovetail-core``, whose suites these are.
        conforms: whether every part does.
    """

    plugin: str
    distribution: str
    version: str
    core: str
    conforms: bool
    seconds: float
    parts: tuple[Part, ...]

    @property
    def verdict(self) -> str:
        """In one sentence."""
        if self.conforms:
            return f"Plugin {self.plugin!r} conforms."
        if any(part.count("failed") for part in self.parts):
            return f"Plugin {self.plugin!r} does not conform."
        return f"Plugin {self.plugin!r} could not be tested in full."


def by_scenario(results: Iterable[Result]) -> tuple[ScenarioResult, ...]:
    """Sum up the tests of each scenario, in the order of their first tests."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.scenario, []).append(result)
    return tuple(_summed(tests) for tests in groups.values())


def unavailable(results: Iterable[Result]) -> str:
    """Why the device is not there, if tests were skipped for that; else nothing."""
    reasons = (result.reason for result in results if result.outcome == "skipped")
    return next((reason for reason in reasons if reason.startswith(UNAVAILABLE)), "")


def _summed(tests: list[Result]) -> ScenarioResult:
    outcome = next(outcome for outcome in OUTCOMES if any(test.outcome == outcome for test in tests))
    reasons = [test.reason for test in tests if test.outcome == outcome and test.reason]
    return ScenarioResult(
        scenario=tests[0].scenario,
        behaviour=tests[0].behaviour,
        outcome=outcome,
        reasons=tuple(dict.fromkeys(reasons)),
        seconds=sum(test.seconds for test in tests),
        tests=tuple(tests),
    )
