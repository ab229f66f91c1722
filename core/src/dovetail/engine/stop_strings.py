"""Stop strings, matched across token boundaries."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches one completion's text and holds back what could be the beginning of a stop string.

    The stop string that is complete first ends the text; of several that end at the same character, the
    longest. So the outcome does not depend on how the text is cut into pieces.

    Args:
        stops: non-empty strings.
        include: leave the stop string in the text.
    """

    __slots__ = ("_held", "_include", "_stops")

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Take more text; return what is certain to be output, and the stop string that was hit, if any.

        After a hit there is no more text: neither ``push`` nor ``flush`` may follow.
        """
        text = self._held + text
        found = ((text.find(stop), stop) for stop in self._stops)
        matches = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
        if matches:
            end, start, stop = min(matches)
            return text[: end if self._include else start], stop
        keep = max(_overlap(text, stop) for stop in self._stops) if text else 0
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut], None

    def flush(self) -> str:
        """The text has ended: return what was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop`` without completing it."""
    first = stop[0]
    position = text.find(first, max(0, len(text) - len(stop) + 1))
    while position >= 0:
        if stop.startswith(text[position:]):
            return len(text) - position
        position = text.find(first, position + 1)
    return 0
