"""The search for what would work instead of a request that does not.

Breadth first, so that the fewest changes win: from every set of options reached so far, each further option that has
other values is changed, and the change is kept if it removes an obstacle. Among equally many changes, those win that
leave alone what was asked for, and then those that matter least to what is computed. Every try is one decision of the
resolver; their number is bounded, and a clock stops the search too, for plugins that are slow to fail. Where so much is
wrong that the bound comes first, everything is left at its default, and put back one by one as long as that works.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from dovetail.config import Change
from dovetail.errors import ConfigError
from dovetail.options import EngineOptions, asked, flag
from dovetail.resolution import alternatives
from dovetail.resolution.case import Case, Outcome

MAX_CHANGES = 4
MAX_TRIED = 1000
MAX_SECONDS = 3.0

NOT_GIVEN = "(not given)"


@dataclass(frozen=True, slots=True)
class Found:
    """A set of options on the way: what was changed to get there, and what it comes to."""

    options: EngineOptions
    changes: tuple[Change, ...]
    outcome: Outcome


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """One option's other value. Compared by identity: the value may be a mapping.

    Attributes:
        cost: 1 if the option was asked for, else 0; and how much the change matters.
    """

    name: str
    value: Any
    cost: tuple[int, float]


Moves = tuple[Move, ...]


class Search:
    """One search.

    Args:
        options: the request.
        outcome: what stands in its way.

    Attributes:
        tried: how many sets of options have been decided on.
    """

    def __init__(self, case: Case, options: EngineOptions, outcome: Outcome) -> None:
        self.tried = 0
        self._case = case
        self._start = Found(options, (), outcome)
        self._moves = moves(case, options, outcome)
        self._deadline = time.monotonic() + MAX_SECONDS

    def run(self) -> Found | None:
        """The nearest set of options that works, or None if there is none within the bounds."""
        return self._broadly() or self._from_defaults()

    def _broadly(self) -> Found | None:
        level: dict[Moves, Found] = {(): self._start}
        for _ in range(MAX_CHANGES):
            origins = self._extended(level)
            level = {}
            for made in sorted(origins, key=cost):
                if self.tried >= MAX_TRIED or time.monotonic() > self._deadline:
                    return None
                reached = self._reach(origins[made])
                if reached is None:
                    continue
                if reached.outcome.config is not None:
                    return reached
                level[made] = reached
        return None

    def _from_defaults(self) -> Found | None:
        """What works without what was asked for, and then with as much of it as works too."""
        wanted, given = self._start.options, asked(self._start.options)
        if time.monotonic() > self._deadline:
            return None
        defaults: dict[str, Any] = {f.name: f.default for f in fields(wanted) if f.name in alternatives.OPTIONS}
        try:
            options = replace(wanted, **defaults)
        except ConfigError:  # they make no sense beside other options
            return None
        outcome = self._decide(options)
        if outcome.config is None:
            return None
        changes: list[Change] = []
        for name in [name for name in alternatives.OPTIONS if name in given][::-1]:
            again = replace(options, **{name: given[name]})
            tried = self._decide(again)
            if tried.config is not None:
                options, outcome = again, tried
                continue
            back = Move(name, defaults[name], (1, 0))
            changes.append(change(again, back, tried.reasons))
        return Found(options, tuple(changes), outcome)

    def _decide(self, options: EngineOptions) -> Outcome:
        self.tried += 1
        return self._case.decide(options)

    def _extended(self, level: Mapping[Moves, Found]) -> dict[Moves, list[tuple[Found, Move]]]:
        """Every set of moves that is one larger than those of the level, with the ways that lead there."""
        origins: dict[Moves, list[tuple[Found, Move]]] = {}
        for made, found in level.items():
            names = {move.name for move in made}
            for move in self._moves:
                if move.name not in names:
                    together = tuple(sorted((*made, move), key=self._moves.index))
                    origins.setdefault(together, []).append((found, move))
        return origins

    def _reach(self, ways: Iterable[tuple[Found, Move]]) -> Found | None:
        """Where a set of moves leads, if the last one of any way removes an obstacle; None if that helps nothing."""
        outcome = None
        for origin, move in ways:
            if outcome is None:
                try:
                    options = replace(origin.options, **{move.name: move.value})
                except ConfigError:  # together with the others the value makes no sense
                    return None
                outcome = self._decide(options)
            removed = tuple(reason for reason in origin.outcome.reasons if reason not in outcome.reasons)
            if removed:
                return Found(options, (*origin.changes, change(origin.options, move, removed)), outcome)
        return None


def moves(case: Case, options: EngineOptions, outcome: Outcome) -> list[Move]:
    """Everything that may be changed."""
    given = asked(options)
    return [
        Move(name, value, (int(name in given), rank + position / 100))
        for rank, name in enumerate(alternatives.OPTIONS)
        for position, value in enumerate(alternatives.values(name, options, case.registries, outcome.facts))
    ]


def cost(made: Moves) -> tuple[int, float]:
    """How far a set of moves leads from the request."""
    return sum(move.cost[0] for move in made), sum(move.cost[1] for move in made)


def change(options: EngineOptions, move: Move, removed: tuple[str, ...]) -> Change:
    """A move in words."""
    return Change(
        option=flag(move.name), asked=shown(getattr(options, move.name)), got=shown(move.value), why=removed
    )


def shown(value: Any) -> str:
    """An option's value as one would type it."""
    if value is None:
        return NOT_GIVEN
    if isinstance(value, bool):
        return "on" if value else "off"
    return json.dumps(value) if isinstance(value, Mapping) else str(value)
