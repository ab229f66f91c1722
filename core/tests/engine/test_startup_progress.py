"""What a user sees while a model loads."""

from __future__ import annotations

import io
import logging

from rich.console import Console

from dovetail.engine.startup_progress import StartupProgress


def test_bars_on_a_terminal():
    stream = io.StringIO()
    with StartupProgress.shown(Console(file=stream, force_terminal=True, width=100)) as progress:
        progress.update("load", 1, 2)
        progress.update("load", 2, 2)
        progress.update("warm-up", 3, 3)
    text = stream.getvalue()
    assert "Loading weights" in text
    assert "100%" in text
    assert "Warming up" in text


def test_lines_in_a_log(caplog):
    caplog.set_level(logging.INFO, "dovetail")
    stream = io.StringIO()
    with StartupProgress.shown(Console(file=stream)) as progress:
        progress.update("load", 1, 2)
        progress.update("load", 2, 2)
    assert caplog.messages == ["Loading weights: done."]
    assert stream.getvalue() == ""
