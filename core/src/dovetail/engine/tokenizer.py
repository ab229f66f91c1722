"""Tokenizer: text <-> token ids, through the ``tokenizers`` library alone. Torch-free.

What a checkpoint says about its tokenizer is spread over several files; they are read as transformers 5 reads
them. tokenizer.json decides how text is split and which special tokens encoding adds (``add_bos_token`` and
``add_eos_token`` of tokenizer_config.json do not); the other files name special tokens and bring the chat template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from dovetail.engine.chat_template import ChatTemplate, Message
from dovetail.engine.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from dovetail.engine.pieces import read_pieces
from dovetail.errors import ConfigError, RequestError

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_NOTHING: frozenset[int] = frozenset()
_LONG_TEXT = 4096


class Tokenizer:
    """Text <-> token ids, and chat -> text.

    Args:
        backend: the tokenizer proper.
        special_tokens: named special tokens, such as ``{"bos_token": "<s>"}``.
        chat_templates: name -> Jinja program; ``"tool_use"`` serves chats with tools, ``"default"`` the rest.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._pieces = read_pieces(backend)
        self._templates = {
            name: ChatTemplate(source, self.special_tokens) for name, source in (chat_templates or {}).items()
        }

    @classmethod
    def from_folder(cls, path: str | Path, chat_template: str | None = None) -> Tokenizer:
        """Read a checkpoint's tokenizer.

        Args:
            path: the checkpoint's folder.
            chat_template: a Jinja program, or the path of one, that replaces the checkpoint's.

        Raises:
            ConfigError: files are missing or unreadable.
        """
        folder = Path(path)
        config = _read_json(folder / "tokenizer_config.json")
        backend = _load_backend(folder)
        named = _named_tokens(folder, config)
        _add_missing(backend, config, named)
        templates = _read_templates(folder, config)
        if chat_template is not None:
            templates = {"default": _template_text(chat_template)}
        return cls(backend, named, templates)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A model's output head may have more rows."""
        size: int = self.backend.get_vocab_size(with_added_tokens=True)
        return size

    @property
    def can_chat(self) -> bool:
        """Whether there is a chat template."""
        return bool(self._templates)

    @property
    def bos_token_id(self) -> int | None:
        """The beginning-of-sequence token, if there is one."""
        return self._id_of("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-sequence token, if there is one."""
        return self._id_of("eos_token")

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that ``skip_special_tokens`` leaves out."""
        return self._special_ids

    def is_special(self, token_id: int) -> bool:
        """Whether ``skip_special_tokens`` leaves this token out."""
        return token_id in self._special_ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Text from a chat template has its special tokens already: then pass False."""
        if len(text) < _LONG_TEXT:
            encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        else:
            # The batch form lets other threads run meanwhile, and skips character offsets, which nobody reads.
            (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens. It is exactly what incremental detokenization gives in the end.

        One deliberate difference to the ``tokenizers`` library: where a byte-fallback tokenizer's run of byte
        tokens is not valid UTF-8 as a whole, its complete characters are kept, and only the other bytes become
        U+FFFD.
        """
        if self._pieces is None:
            return self._decode_whole(token_ids, skip_special_tokens)
        stream = self.detokenizer(skip_special_tokens)
        return stream.push(token_ids) + stream.flush()

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        """A new incremental detokenizer."""
        if self._pieces is None:
            return WindowDetokenizer(lambda ids: self._decode_whole(ids, skip_special_tokens))
        return ByteDetokenizer(self._pieces, self._special_ids if skip_special_tokens else _NOTHING)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None for an unknown id."""
        token: str | None = self.backend.id_to_token(token_id)
        return token

    def token_to_id(self, token: str) -> int | None:
        """The id of a token spelt as in the vocabulary; None for an unknown one."""
        token_id: int | None = self.backend.token_to_id(token)
        return token_id

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; a fragment of a character for some."""
        if self._pieces is None:
            return self._decode_whole([token_id], False).encode()
        return self._pieces.of(token_id)

    def token_text(self, token_id: int) -> str:
        """A single token as text, special ones included; U+FFFD where it is a fragment of a character."""
        return self.token_bytes(token_id).decode(errors="replace")

    def apply_chat_template(
        self,
        /,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """Write a conversation as a prompt; encode it with ``add_special_tokens=False``.

        Raises:
            RequestError: there is no template, or it rejects the messages.
        """
        template = self._templates.get("tool_use") if tools else None
        template = template or self._templates.get("default")
        if template is None:
            raise RequestError(
                "This model has no chat template, so it cannot chat. Use completions, or give a template "
                "with --chat-template PATH (LLM: chat_template=...).",
                param="messages",
            )
        return template.render(messages, tools, add_generation_prompt, continue_final_message, **kwargs)

    @property
    def has_chat_template(self) -> bool:
        """Whether ``apply_chat_template`` can work."""
        return "default" in self._templates

    def template_mentions(self, word: str) -> bool:
        """Whether a chat template contains a word, such as the name of a role."""
        return any(word in template.source for template in self._templates.values())

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_to_id(token)

    def _decode_whole(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text


def _load_backend(folder: Path) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        return _convert(folder)
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:
        # The library raises bare Exception for every malformed file.
        raise ConfigError(f"{file} cannot be read as a tokenizer: {error}.") from error


def _convert(folder: Path) -> tokenizers.Tokenizer:
    """A tokenizer in an older format, converted by transformers."""
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder} to read a tokenizer from.")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConfigError(
            f"{folder} holds no tokenizer.json, and converting an older format needs transformers: "
            "pip install 'dovetail-core[transformers]', or name a folder with --tokenizer."
        ) from error
    try:
        backend: tokenizers.Tokenizer = AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer
    except Exception as error:
        # transformers raises whatever the many formats' readers raise.
        details = str(error).strip().splitlines() or ["no details"]
        raise ConfigError(
            f"{folder} holds no tokenizer.json, and transformers finds no tokenizer that it can convert "
            f"({type(error).__name__}: {details[0]}). Name a folder that has one with --tokenizer."
        ) from error
    return backend


def _named_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and its like; special_tokens_map.json counts only where the config lists no added tokens."""
    sources = [config]
    if "added_tokens_decoder" not in config:
        sources.append(_read_json(folder / "special_tokens_map.json"))
    named: dict[str, str] = {}
    for source in sources:
        for name in _NAMED:
            content = _content(source.get(name))
            if content:
                named[name] = content
    return named


def _add_missing(backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Make tokens known that only tokenizer_config.json lists, and mark every named one as special."""
    present = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    listed = sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
    for _, entry in listed:
        if entry["content"] not in present:
            token = _added_token(entry)
            backend.add_special_tokens([token]) if token.special else backend.add_tokens([token])
            present[token.content] = token
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = extra.values() if isinstance(extra, dict) else extra
    for content in (*named.values(), *map(_content, extra)):
        if content and (content not in present or not present[content].special):
            token = tokenizers.AddedToken(content, special=True, normalized=False)
            backend.add_special_tokens([token])
            present[content] = token


def _added_token(entry: Mapping[str, Any]) -> tokenizers.AddedToken:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    given = {flag: bool(entry[flag]) for flag in flags if flag in entry}
    return tokenizers.AddedToken(entry["content"], **given)


def _content(token: Any) -> str | None:
    """A special token is a string, or an object with its content."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name. Files of their own come before the config's entry."""
    found: dict[str, str] = {}
    single = folder / "chat_template.jinja"
    if single.is_file():
        found["default"] = single.read_text(encoding="utf-8")
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[file.stem] = file.read_text(encoding="utf-8")
    if found:
        return found
    value = _read_json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        return {entry["name"]: entry["template"] for entry in value}
    return dict(value) if isinstance(value, dict) else {}


def _template_text(value: str) -> str:
    """A Jinja program given as such, or as the path of a file."""
    if "{" in value or "\n" in value:
        return value
    try:
        return Path(value).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The chat template {value} cannot be read: {error}.") from error


def _read_json(file: Path) -> dict[str, Any]:
    """An optional JSON file; a missing one is empty."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} must hold a JSON object; it holds a {type(value).__name__}.")
    return value
