"""What came of a conformance run, as messages that a report is made of. Imports neither torch nor pytest."""

from __future__ import annotations

import msgspec


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One test.

    Attributes:
        suite: name of the test class.
        scenario: its id, e.g. ``"attention.4"``.
        behaviour: what the scenario requires.
        test: name of the test with its parameters.
        outcome: ``"passed"``, ``"failed"`` or ``"skipped"``.
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
