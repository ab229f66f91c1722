"""A suffix automaton: every substring of a growing sequence, in linear memory (Blumer et al. 1985)."""

from __future__ import annotations

ROOT = 0


class SuffixAutomaton:
    """States stand for sets of substrings that end at the same places.

    A state's suffix link leads to the longest suffix of its substrings that also ends elsewhere. So the link of the
    whole sequence's state is the longest suffix that occurred before, whatever its length, and nothing is searched.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self._end = [0]
        self._last = ROOT
        self._repeated = (0, 0)

    def append(self, token: int) -> None:
        """Extend the sequence by one token; constant time on average."""
        self.tokens.append(token)
        new = self._state({}, self._length[self._last] + 1, len(self.tokens))
        state = self._last
        while state >= 0 and token not in self._next[state]:
            self._next[state][token] = new
            state = self._link[state]
        self._link[new] = ROOT if state < 0 else self._suffix(state, token)
        self._last = new
        match = self._link[new]
        self._repeated = (self._length[match], self._end[match])
        self._end[match] = len(self.tokens)  # the next time, continue as the latest occurrence did

    def _suffix(self, state: int, token: int) -> int:
        """The state of exactly one token more than ``state``, split off a longer one if need be."""
        target = self._next[state][token]
        length = self._length[state] + 1
        if self._length[target] == length:
            return target
        clone = self._state(dict(self._next[target]), length, self._end[target])
        self._link[clone], self._link[target] = self._link[target], clone
        while state >= 0 and self._next[state].get(token) == target:
            self._next[state][token] = clone
            state = self._link[state]
        return clone

    def _state(self, following: dict[int, int], length: int, end: int) -> int:
        self._next.append(following)
        self._link.append(ROOT)
        self._length.append(length)
        self._end.append(end)
        return len(self._next) - 1

    def continuation(self, min_match: int, limit: int) -> list[int]:
        """What followed the longest suffix that occurred before, at most ``limit`` tokens.

        Args:
            min_match: shortest suffix that counts, at least 1.
        """
        length, end = self._repeated
        return self.tokens[end : end + limit] if length >= min_match else []
