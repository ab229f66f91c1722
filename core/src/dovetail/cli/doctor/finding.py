"""What a check found, and how checks are run: each on its own, so that what is broken hides nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import msgspec

from dovetail.cli.doctor.subject import Subject
from dovetail.errors import DovetailError
from dovetail.plugins.remedy import one_line

OK, WARNING, PROBLEM = "ok", "warning", "problem"


class Finding(msgspec.Struct, frozen=True):
    """One line of the report.

    Attributes:
        level: ``"ok"``, ``"warning"`` (it may do) or ``"problem"`` (it will not).
        found: what there is, in words.
        remedy: what to do about it; empty if nothing.
    """

    level: str
    found: str
    remedy: str = ""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A finding with the name of its check."""

    check: str
    level: str
    found: str
    remedy: str


Check = Callable[[Subject], Iterable[Finding]]


def ok(found: str) -> Finding:
    """All is well."""
    return Finding(OK, found)


def warning(found: str, remedy: str) -> Finding:
    """It may do."""
    return Finding(WARNING, found, remedy)


def problem(found: str, remedy: str) -> Finding:
    """It will not do."""
    return Finding(PROBLEM, found, remedy)


def with_torch(check: Check) -> Check:
    """The check, left out where torch is broken, which is told once."""

    def guarded(subject: Subject) -> Iterable[Finding]:
        if subject.torch_error:
            return [warning("not checked, since torch cannot be imported", "Repair torch, then check again.")]
        return check(subject)

    return guarded


def examine(checks: Mapping[str, Check], subject: Subject) -> list[Line]:
    """Run every check; one that fails is a problem of its own, and the others run all the same."""
    lines = []
    for name, check in checks.items():
        lines += [
            Line(check=name, level=finding.level, found=finding.found, remedy=finding.remedy)
            for finding in _isolated(check, subject)
        ]
    return lines


def _isolated(check: Check, subject: Subject) -> list[Finding]:
    findings: list[Finding] = []
    try:
        findings.extend(check(subject))
    except DovetailError as error:
        findings.append(problem(str(error), ""))
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever is broken here is what the user wants to know
        findings.append(problem(f"cannot be checked: {one_line(error)}", "Repair what it names, then check again."))
    return findings
