"""What a user sees while a model loads: progress bars on a terminal, lines in a log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from dovetail.contracts.executor import Progress

_logger = logging.getLogger("dovetail.startup")
_TITLES = {"load": "Loading weights", "warm-up": "Warming up"}


class StartupProgress(Progress):
    """One bar per stage, or one line per finished stage where there is no terminal."""

    def __init__(self, bars: Bars | None) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    @classmethod
    @contextmanager
    def shown(cls, console: Console) -> Iterator[StartupProgress]:
        """Show progress on ``console`` while the context lasts."""
        if not console.is_terminal:
            yield cls(None)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Bars(*columns, console=console) as bars:
            yield cls(bars)

    def update(self, stage: str, done: int, total: int) -> None:
        """Draw or log."""
        title = _TITLES.get(stage, stage)
        if self._bars is None:
            if done == total:
                _logger.info("%s: done.", title)
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(title, total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)
