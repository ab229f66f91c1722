"""What a plugin module may cost: no heavy library, not much time, and a word when it hangs."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType

from dovetail.errors import PluginLoadError

HEAVY = frozenset({"torch", "transformers", "tensorflow", "numpy", "scipy", "pandas", "tokenizers", "huggingface_hub"})
"""Libraries that a plugin module must leave to its targets: every command pays for what is imported here."""
SLOW_SECONDS = 1.0
"""From here on a plugin's import is worth a warning."""
HANG_SECONDS = 5.0
"""From here on somebody may be waiting and wonder for whom."""


class HeavyImports:
    """A finder on ``sys.meta_path`` that refuses heavy libraries to one thread, unless they are loaded already.

    Attributes:
        refused: what was asked for.
    """

    def __init__(self) -> None:
        self.refused: list[str] = []
        self._thread = threading.get_ident()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None lets the next finder answer.

        Raises:
            PluginLoadError: the library is heavy. Not an ImportError: a plugin must not take it for absent.
        """
        if name in HEAVY and threading.get_ident() == self._thread:
            self.refused.append(name)
            raise PluginLoadError(_heavy(name))
        return None

    def check(self) -> None:
        """Refuse as well if the plugin swallowed the refusal.

        Raises:
            PluginLoadError: something heavy was asked for.
        """
        if self.refused:
            raise PluginLoadError(_heavy(self.refused[0]))


@contextmanager
def light_imports() -> Iterator[None]:
    """Imports of heavy libraries fail inside.

    Raises:
        PluginLoadError: one was tried.
    """
    finder = HeavyImports()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
    finder.check()


@contextmanager
def watched(owner: str, name: str) -> Iterator[None]:
    """Say on stderr who is loading, and where, if it takes very long."""
    thread = threading.get_ident()
    begin = time.perf_counter()

    def speak() -> None:
        frame = sys._current_frames().get(thread)
        place = f", now at {frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else ""
        print(  # noqa: T201
            f"dovetail: {owner} has been loading for {time.perf_counter() - begin:.0f} s{place}. "
            f"If it hangs, leave it out with DOVETAIL_DISABLE_PLUGINS={name}.",
            file=sys.stderr,
        )

    timer = threading.Timer(HANG_SECONDS, speak)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def slowness(seconds: float) -> str:
    """A warning, if it took long; else nothing."""
    if seconds < SLOW_SECONDS:
        return ""
    return (
        f"slow: its import took {seconds:.1f} s, and every command waits for it; a plugin module should import "
        "nothing that takes time, and leave that to the modules that its targets name."
    )


def _heavy(library: str) -> str:
    return (
        f"its plugin module imports {library}, which every command would pay for. A plugin module must be light: move "
        "the import into the module that a target names."
    )
