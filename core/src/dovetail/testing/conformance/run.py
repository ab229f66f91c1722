"""Running suites outside of a test session: what ``dovetail conformance`` does, and tests of the suites themselves."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from dovetail.testing.conformance.report import Result
from dovetail.testing.conformance.suite import Scenario, Suite

_MODULE = "from dovetail.testing.conformance import run\n\nglobals().update(run.CLASSES)\n"
_ARGUMENTS = (
    "--capture=sys",
    "--import-mode=importlib",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:terminal",
    "-p",
    "no:faulthandler",
    "-p",
    "no:unraisableexception",
    "-p",
    "no:threadexception",
)
_SKIPPED = "Skipped: "

CLASSES: dict[str, type[Suite]] = {}
"""What the module that pytest collects holds; set by :func:`run` alone."""


def run(
    suites: Mapping[str, type[Suite]],
    *,
    only: Collection[str] = (),
    on_result: Callable[[Result], None] = lambda _: None,
) -> list[Result]:
    """Run suites with pytest, unaffected by the configuration and the plugins of pytest that are around.

    Args:
        suites: subclasses with a subject, by a name that begins with ``Test``.
        only: scenario ids to run; empty runs all.
        on_result: called after each test.

    Returns:
        One result per test, in the order in which they ran.
    """
    collector = _Collector(only, on_result)
    CLASSES.clear()
    CLASSES.update(suites)
    with tempfile.TemporaryDirectory(prefix="dovetail-conformance-") as folder, _plain_pytest():
        # A name of its own: an imported module is found by its name when another run wants it.
        module = Path(folder, f"test_{Path(folder).name.replace('-', '_')}.py")
        module.write_text(_MODULE)
        ini = Path(folder, "pytest.ini")
        ini.write_text("[pytest]\n")
        places = [str(module), "-c", str(ini), f"--rootdir={folder}", f"--confcutdir={folder}"]
        code = pytest.main([*places, *_ARGUMENTS, f"--basetemp={folder}/files"], plugins=[collector])
    CLASSES.clear()
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest ended with {code!r}: {'; '.join(collector.problems) or 'no reason given'}")
    return collector.results


@contextmanager
def _plain_pytest() -> Iterator[None]:
    """Without options from the environment, and without whatever plugins of pytest are installed."""
    before = dict(os.environ)
    os.environ.pop("PYTEST_ADDOPTS", None)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class _Collector:
    """A plugin of pytest that keeps what came of each test."""

    def __init__(self, only: Collection[str], on_result: Callable[[Result], None]) -> None:
        self.results: list[Result] = []
        self.problems: list[str] = []
        self._only = only
        self._on_result = on_result
        self._started = 0.0
        self._reports: list[pytest.TestReport] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the scenarios that were asked for."""
        if self._only:
            items[:] = [item for item in items if _scenario(item).id in self._only]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A suite that cannot even be collected is a failure of ours, not of the subject."""
        if report.failed:
            self.problems.append(report.longreprtext)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Time one test and sum up its phases."""
        self._started, self._reports = time.perf_counter(), []
        outcome = yield
        result = _result(item, self._reports, time.perf_counter() - self._started)
        self.results.append(result)
        self._on_result(result)
        return outcome

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of the current test."""
        self._reports.append(report)


def _scenario(item: pytest.Item) -> Scenario:
    assert isinstance(item, pytest.Function)
    return Scenario.of(item.function)


def _result(item: pytest.Item, reports: list[pytest.TestReport], seconds: float) -> Result:
    scenario = _scenario(item)
    failed = next((report for report in reports if report.failed), None)
    skipped = next((report for report in reports if report.skipped), None)
    outcome, reason, details = "passed", "", ""
    if failed is not None:
        outcome, details = "failed", failed.longreprtext
        reason = _reason(failed)
    elif skipped is not None:
        outcome = "skipped"
        reason = str(skipped.longrepr[2] if isinstance(skipped.longrepr, tuple) else skipped.longrepr)
        reason = reason.removeprefix(_SKIPPED)
    suite = item.getparent(pytest.Class)
    return Result(
        suite="" if suite is None else suite.name,
        scenario=scenario.id,
        behaviour=scenario.behaviour,
        test=item.name,
        outcome=outcome,
        reason=reason,
        details=details,
        seconds=seconds,
    )


def _reason(report: pytest.TestReport) -> str:
    """The message of a failure, without where it was raised."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else report.longreprtext
    return re.sub(r"^(_pytest\.outcomes\.|builtins\.)?Failed: ", "", text).strip()
