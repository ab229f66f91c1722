"""Incremental detokenization: text that can no longer change, as soon as it is known."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Set

from dovetail.engine.pieces import Pieces


class Detokenizer(ABC):
    """Turns one stream of tokens into text. What was returned is final; the parts joined are the whole text."""

    @abstractmethod
    def push(self, token_ids: Sequence[int]) -> str:
        """Take more tokens; return the text that they settle."""
        ...

    @abstractmethod
    def flush(self) -> str:
        """The stream has ended: return what was held back."""
        ...


class ByteDetokenizer(Detokenizer):
    """For tokenizers whose tokens stand for bytes: one lookup per token; UTF-8 holds back split characters.

    Args:
        pieces: the bytes of each token.
        skipped: ids of tokens that give no text.
    """

    __slots__ = ("_pieces", "_skipped", "_started", "_strip", "_utf8")

    def __init__(self, pieces: Pieces, skipped: Set[int]) -> None:
        self._pieces = pieces
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")(pieces.errors)
        self._started = not pieces.drop_in_first
        self._strip = pieces.strip_first

    def push(self, token_ids: Sequence[int]) -> str:
        """Take more tokens; return every character that they complete."""
        skipped, of = self._skipped, self._pieces.of
        shown = [token for token in token_ids if token not in skipped]
        if not self._started and shown:
            self._started = True
            data = self._pieces.first(shown[0]) + b"".join(map(of, shown[1:]))
        else:
            data = b"".join(map(of, shown))
        return self._release(self._utf8.decode(data))

    def flush(self) -> str:
        """Undecodable bytes at the end become U+FFFD."""
        return self._release(self._utf8.decode(b"", True))

    def _release(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            text = text[1:]
            self._strip -= 1
        return text


class WindowDetokenizer(Detokenizer):
    """For any other decoder: decodes a window of recent tokens and returns by how much the text has grown.

    The window holds the tokens that gave the previous text and those that gave none since: what a token adds may
    depend on the token before it.
    """

    __slots__ = ("_decode", "_done", "_window")

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._done = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """Take more tokens; text that ends in U+FFFD may be half a character and waits."""
        text = []
        for token in token_ids:
            self._window.append(token)
            text.append(self._grow(final=False))
        return "".join(text)

    def flush(self) -> str:
        """Return what waited."""
        return self._grow(final=True)

    def _grow(self, final: bool) -> str:
        before = self._decode(self._window[: self._done])
        after = self._decode(self._window)
        if len(after) <= len(before) or (after.endswith("\ufffd") and not final):
            return ""
        del self._window[: self._done]
        self._done = len(self._window)
        return after[len(before) :]
