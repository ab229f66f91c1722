"""Chat templates: Jinja programs of a checkpoint that write a conversation as one prompt.

They are foreign code, so they run in Jinja's immutable sandbox. The environment offers what templates on the hub
are written against: transformers' ``apply_chat_template``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dovetail.errors import ConfigError, RequestError

Message = Mapping[str, Any]

_REASONING = ("reasoning_content", "thinking", "reasoning")
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_PROBE = "pRoBe"


class ChatTemplate:
    """One compiled template.

    Args:
        source: the Jinja program.
        variables: values that every rendering sees, such as ``bos_token``.

    Raises:
        ConfigError: the program does not compile.
    """

    def __init__(self, source: str, variables: Mapping[str, str] | None = None) -> None:
        self.source = source
        self._variables = dict(variables or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            message = f"The chat template does not compile: line {error.lineno}: {error.message}."
            raise ConfigError(message) from error
        self._takes_parts: bool | None = None

    def render(
        self,
        /,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """Write a conversation as a prompt.

        Args:
            messages: mappings with a role and content: text, or parts ``{"type": "text", "text": ...}``.
            tools: JSON descriptions of functions.
            add_generation_prompt: end with the beginning of an assistant message.
            continue_final_message: leave the last message open, so that the model continues it.
            kwargs: further variables for the template.

        Raises:
            RequestError: malformed messages, or messages that the template rejects.
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt are both true; set add_generation_prompt to "
                "false to continue the last message.",
                param="continue_final_message",
            )
        for name in _RESERVED:
            if name in kwargs:
                message = f"chat_template_kwargs must not set {name!r}; it is a field of its own."
                raise RequestError(message, param="chat_template_kwargs")
        chat = [self._normalized(i, message) for i, message in enumerate(_checked(messages))]
        opened = _open_last(chat) if continue_final_message else None
        # An empty list of tools is "no tools" for clients, but "tools" for templates that test `is not none`.
        text = self._run(chat, tools or None, add_generation_prompt, kwargs)
        return text if opened is None else _cut_at_tag(text, opened)

    def _run(
        self, chat: list[dict[str, Any]], tools: Any, add_generation_prompt: bool, kwargs: Mapping[str, Any]
    ) -> str:
        variables: dict[str, Any] = {**self._variables, "documents": None, **kwargs}
        try:
            return self._template.render(
                {**variables, "messages": chat, "tools": tools, "add_generation_prompt": add_generation_prompt}
            )
        except Exception as error:
            # A template is a program: besides raise_exception, any operation on the caller's values can fail.
            message = f"The chat template rejects these messages: {error}"
            raise RequestError(message, param="messages") from error

    def _normalized(self, index: int, message: Message) -> dict[str, Any]:
        result = {key: value for key, value in message.items() if value is not None}
        content = result.get("content")
        if isinstance(content, (list, tuple)):
            texts = [_part_text(index, part) for part in content]
            parts = [{"type": "text", "text": text} for text in texts]
            result["content"] = parts if self.takes_parts else "\n".join(texts)
        elif content is not None and not isinstance(content, str):
            kind = type(content).__name__
            raise RequestError(
                f"messages[{index}].content is a {kind}; it must be text or a list of parts.", param="messages"
            )
        if "tool_calls" in result:
            if not isinstance(result["tool_calls"], (list, tuple)):
                raise RequestError(f"messages[{index}].tool_calls must be a list.", param="messages")
            result["tool_calls"] = [_parsed_call(call) for call in result["tool_calls"]]
        reasoning = next((result[key] for key in _REASONING if key in result), None)
        if reasoning is None:
            return result
        return {"thinking": reasoning, **result, "reasoning_content": reasoning}

    @property
    def takes_parts(self) -> bool:
        """Whether the template writes content that is a list of parts; found out by trying."""
        if self._takes_parts is None:
            probe = [{"role": "user", "content": [{"type": "text", "text": _PROBE}]}]
            try:
                text = self._run(probe, None, False, {})
            except RequestError:
                text = ""
            # A template that knows nothing of lists prints the list itself, with the text in quotes.
            self._takes_parts = _PROBE in text and f"'{_PROBE}'" not in text and f'"{_PROBE}"' not in text
        return self._takes_parts


def _checked(messages: Sequence[Message]) -> Sequence[Message]:
    if not messages:
        raise RequestError("messages is empty; send at least one message.", param="messages")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            text = f"messages[{i}] must be an object with a role, such as 'user'."
            raise RequestError(text, param="messages")
    return messages


def _part_text(index: int, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise RequestError(
        f"messages[{index}].content has a part of type {kind!r}; only text parts, "
        "{'type': 'text', 'text': ...}, are understood.",
        param="messages",
    )


def _parsed_call(call: Any) -> Any:
    """Clients send arguments as JSON text; templates expect the object and write it with ``tojson``."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _open_last(chat: list[dict[str, Any]]) -> str:
    """Mark the end of the last message's text; return that text."""
    content = chat[-1].get("content")
    text = content[-1]["text"] if isinstance(content, list) and content else content
    if not isinstance(text, str):
        raise RequestError(
            "continue_final_message is true, but the last message has no text to continue.", param="messages"
        )
    if isinstance(content, list):
        chat[-1]["content"] = [*content[:-1], {"type": "text", "text": text + _TAG}]
    else:
        chat[-1]["content"] = text + _TAG
    return text


def _cut_at_tag(rendered: str, text: str) -> str:
    tag = _TAG.strip()
    at = rendered.rfind(tag)
    if at < 0 or text.strip() not in rendered:
        raise RequestError(
            "continue_final_message is true, but the chat template does not write the last message in full, so "
            "it cannot be continued.",
            param="messages",
        )
    # A template that trims messages took the tag's own space, and so the text's trailing space must go too.
    trimmed = not rendered.startswith(_TAG, at)
    return rendered[:at].rstrip() if trimmed else rendered[:at]


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        """Keep the body, in a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
