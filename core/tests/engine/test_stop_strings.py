"""Stop strings: found wherever the text is cut, and nothing that could begin one gets out early."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.engine.stop_strings import StopStrings


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Brute force: read character by character until some stop string ends there; the longest wins."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            stop = max(hits, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def feed(watcher: StopStrings, parts: list[str]) -> tuple[str, str | None]:
    out = ""
    for part in parts:
        text, stop = watcher.push(part)
        out += text
        if stop is not None:
            return out, stop
    return out + watcher.flush(), None


stop_lists = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=400, deadline=None)
@given(parts=st.lists(st.text("ab", max_size=4), max_size=8), stops=stop_lists, include=st.booleans())
def test_any_cut_gives_the_same(parts, stops, include):
    assert feed(StopStrings(stops, include), parts) == expected("".join(parts), stops, include)


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.text("ab", max_size=3), max_size=8), stops=stop_lists)
def test_what_is_held_is_the_least_that_is_safe(parts, stops):
    watcher, released = StopStrings(stops, False), ""
    for i, part in enumerate(parts):
        text, stop = watcher.push(part)
        released += text
        if stop is not None:
            return
        seen = "".join(parts[: i + 1])
        held = seen[len(released) :]
        assert seen.startswith(released)
        assert held == "" or any(stop.startswith(held) for stop in stops)
        longer = [seen[-n:] for n in range(len(held) + 1, len(seen) + 1)]
        assert not any(stop.startswith(end) for end in longer for stop in stops if len(stop) > len(end))


def test_the_stop_that_is_complete_first_wins():
    assert StopStrings(["abcd", "bc"], False).push("xabcd") == ("xa", "bc")
    assert StopStrings(["c", "abc"], False).push("xabcd") == ("x", "abc")


def test_including_keeps_the_stop_string_and_nothing_after():
    assert StopStrings(["END"], True).push("all ENDs well") == ("all END", "END")
