"""The list of scenarios: what each conformance suite requires, from the docstrings of its tests."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

from dovetail.testing.conformance.catalogue import ALL
from dovetail.testing.conformance.suite import Scenario, Suite, scenarios

INTRO = """
What an implementation of each contract must do. An id never changes its meaning; it appears in failures, in the
reports of `dovetail conformance`, and here. A scenario that *needs* a capability is skipped where the manifest does not
declare it. How to run a suite: [conformance.md](../plugins/conformance.md).
"""
Table = Callable[[tuple[str, ...], Iterable[list[str]]], str]


def page(notice: str, table: Table, plain: Callable[[str], str]) -> str:
    """The whole page; ``table`` makes markdown of a head and rows, ``plain`` of a docstring's markup."""
    parts = [notice, "# Scenarios\n", INTRO.strip() + "\n"]
    for suite in ALL:
        doc = (inspect.getdoc(suite) or "").partition("\n\n")[0]
        parts += [f"## {suite.__name__}\n", f"{plain(doc)}\n", scenario_table(suite, table, plain)]
    return "\n".join(parts)


def scenario_table(suite: type[Suite], table: Table, plain: Callable[[str], str]) -> str:
    """One row per scenario."""
    return table(("id", "behaviour", "needs", "test"), [row(found, plain) for found in scenarios(suite)])


def row(found: Scenario, plain: Callable[[str], str]) -> list[str]:
    """The cells of a scenario."""
    needs = ", ".join(f"`{capability}`" for capability in found.needs)
    return [found.id, plain(found.behaviour), needs, f"`{found.test}`"]
