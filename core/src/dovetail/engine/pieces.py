"""Which bytes each token stands for, read from a tokenizer's decoder.

The decoders of generative models reduce to one rule: every token stands for some bytes, and the text is those
bytes read as UTF-8, perhaps without its first space. Decoding is then one table lookup per token and needs no
look-back.
"""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import tokenizers

PER_BYTE = "dovetail.per_byte"
"""UTF-8 error handler: one U+FFFD per undecodable byte, as byte-fallback decoders write them."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError), "registered for decoding only"
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(PER_BYTE, _replace_each_byte)


def _byte_level_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: itself, or if unprintable one from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


@dataclass(slots=True)
class Pieces:
    """Token id -> bytes, computed on first use.

    Attributes:
        byte_level: tokens are written in byte-level BPE's alphabet.
        byte_fallback: tokens ``<0xNN>`` are single bytes.
        replacements: applied to each token's text, in order.
        strip_first: spaces dropped from the start of the text.
        drop_in_first: a character that is dropped, not replaced, in the first token.
    """

    backend: tokenizers.Tokenizer
    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    strip_first: int = 0
    drop_in_first: str = ""
    _cache: dict[int, bytes] = field(default_factory=dict)

    @property
    def errors(self) -> Literal["replace", "dovetail.per_byte"]:
        """The UTF-8 error handler that agrees with the decoder."""
        return "dovetail.per_byte" if self.byte_fallback else "replace"

    def of(self, token_id: int) -> bytes:
        """The token's bytes; none for an id without a token."""
        piece = self._cache.get(token_id)
        if piece is None:
            piece = self._cache[token_id] = self._compute(self.backend.id_to_token(token_id) or "")
        return piece

    def first(self, token_id: int) -> bytes:
        """The bytes of a token at the start of a text."""
        return self._compute((self.backend.id_to_token(token_id) or "").replace(self.drop_in_first, ""))

    def _compute(self, token: str) -> bytes:
        if self.byte_level:
            if all(c in _ALPHABET for c in token):
                return bytes(_ALPHABET[c] for c in token)
            return token.encode()
        for old, new in self.replacements:
            token = token.replace(old, new)
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.encode()


def read_pieces(backend: tokenizers.Tokenizer) -> Pieces | None:
    """The byte table of a tokenizer, or None where its decoder does not reduce to one."""
    decoder = _decoder_of(backend)
    if decoder is None:
        return None
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return Pieces(backend, byte_level=True)
    if kinds == ["Metaspace"]:
        mark = steps[0]["replacement"]
        drops = steps[0].get("prepend_scheme", "always") != "never"
        return Pieces(backend, replacements=((mark, " "),), drop_in_first=mark if drops else "")
    return _read_chain(backend, steps)


def _decoder_of(backend: tokenizers.Tokenizer) -> dict[str, Any] | None:
    """The decoder's serialized form, without the rest of the tokenizer and its large vocabulary."""
    if backend.decoder is None:
        return None
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    return state


def _read_chain(backend: tokenizers.Tokenizer, steps: list[dict[str, Any]]) -> Pieces | None:
    """Replace*, ByteFallback?, Fuse?, Strip?: the chain of SentencePiece-like tokenizers."""
    pieces = Pieces(backend)
    expected = ["Replace", "ByteFallback", "Fuse", "Strip"]
    position = 0
    for step in steps:
        kind = step["type"]
        if kind not in expected[position:]:
            return None
        position = expected.index(kind) + (kind != "Replace")
        if kind == "Replace":
            pattern = step["pattern"].get("String")
            if pattern is None:
                return None
            pieces.replacements += ((pattern, step["content"]),)
        elif kind == "ByteFallback":
            pieces.byte_fallback = True
        elif kind == "Strip":
            if step["content"] != " " or step["stop"] != 0 or steps[-2]["type"] != "Fuse":
                return None
            pieces.strip_first = step["start"]
    return pieces
