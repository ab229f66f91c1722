"""What clients send: OpenAI's request bodies, and the extra fields that users of other servers know.

Types are strict (``"5"`` is no number), numbers are finite, and null means "not given" everywhere. Fields that would
change the result and are not supported are refused; all others that are unknown here are ignored.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from dovetail.errors import RequestError
from dovetail.sampling_params import SamplingParams

Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
# One wrong item is enough: to describe millions of them would hold up the server for seconds.
Integers = Annotated[list[Int64], Field(fail_fast=True)]
Strings = Annotated[list[str], Field(fail_fast=True)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
Body = TypeVar("Body", bound="RequestBody")

_logger = logging.getLogger("dovetail.server")

_UNSUPPORTED = {
    "suffix": "Put prefix and suffix into the prompt with the model's own fill-in-the-middle tokens.",
    "prompt_embeds": "Send the prompt as text or token ids.",
    "use_beam_search": "Use n with a temperature instead.",
    "bad_words": "Use logit_bias instead.",
    "logits_processors": "Use logit_bias or allowed_token_ids instead.",
    "structured_outputs": "Ask for the format in the prompt.",
    "guided_json": "Ask for the format in the prompt.",
    "guided_regex": "Ask for the format in the prompt.",
    "guided_choice": "Ask for the format in the prompt.",
    "guided_grammar": "Ask for the format in the prompt.",
    "guided_json_object": "Ask for the format in the prompt.",
    "structural_tag": "Ask for the format in the prompt.",
    "chat_template": "Start the server with --chat-template PATH.",
    "functions": "Leave it out, or send tools with tool_choice 'none'.",
    "audio": "Only text is understood.",
    "mm_processor_kwargs": "Only text is understood.",
    "kv_transfer_params": "Leave it out.",
    "thinking_token_budget": "Use max_tokens instead.",
    "repetition_detection": "Use repetition_penalty instead.",
}
"""Fields that would silently change the result, with what to do instead. Empty values ask for nothing."""

_IGNORED = frozenset(
    {
        "user", "store", "metadata", "service_tier", "reasoning_effort", "verbosity", "modalities",
        "prompt_cache_key", "safety_identifier", "prediction", "parallel_tool_calls",
        "prompt_cache_retention", "web_search_options", "function_call", "request_id",
        "spaces_between_special_tokens", "length_penalty", "early_stopping", "stream_interval",
    }
)
"""Known, and without meaning here."""

class RequestBody(BaseModel):
    """What all request bodies share."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())

    model: str | None = None

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Parse and check a body.

        Raises:
            RequestError: malformed JSON, a field of the wrong type, or one that is not supported.
        """
        try:
            body = cls.model_validate_json(data)
        except ValidationError as error:
            raise _request_error(error.errors(include_url=False)) from None
        body.refuse_unsupported()
        return body

    def refuse_unsupported(self) -> None:
        """Check the fields that are not declared.

        Raises:
            RequestError: one of them would change the result.
        """
        extra = self.model_extra or {}
        for name, remedy in _UNSUPPORTED.items():
            if extra.get(name):
                raise RequestError(f"{name} is not supported. {remedy}", param=name)
        response_format = extra.get("response_format")
        if response_format is not None:
            _check_response_format(response_format)
        for name in extra.keys() - _UNSUPPORTED.keys() - _IGNORED - {"response_format"}:
            _logger.debug("Ignoring the unknown request field %r.", name)


class StreamOptions(BaseModel):
    """``stream_options``."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(RequestBody):
    """What completions and chat share. None stands for a field's default."""

    n: int | None = None
    max_tokens: Int64 | None = None
    min_tokens: Int64 | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int64 | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Strings | None = None
    stop_token_ids: Integers | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: Integers | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Int64 | None = None
    cache_salt: str | None = None
    truncate_prompt_tokens: Int64 | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream carries usage."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def sampling_params(
        self,
        defaults: Mapping[str, Any],
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> SamplingParams:
        """The engine's parameters.

        Args:
            defaults: values for fields that the request leaves open.

        Raises:
            RequestError: a value is out of range.
        """
        values: dict[str, Any] = dict(defaults)
        for name in _SAMPLING_FIELDS:
            value = getattr(self, name)
            if value is not None:
                values[name] = value
        values.update(
            stop=_strings(self.stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=_token_biases(self.logit_bias),
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        return SamplingParams(**values)


_SAMPLING_FIELDS = (
    *("n", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "seed", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens"),
)


class CompletionBody(GenerationBody):
    """``POST /v1/completions``."""

    prompt: Any = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts, of any of the four forms: text, texts, token ids, lists of token ids.

        Raises:
            RequestError: any other form, or none at all.
        """
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt, list) and prompt:
            if all(isinstance(item, str) for item in prompt):
                return list(prompt)
            if _is_token_ids(prompt):
                return [prompt]
            if all(isinstance(item, list) and _is_token_ids(item) for item in prompt):
                return list(prompt)
        what = "prompt is missing" if prompt is None else _wrong(prompt)
        raise RequestError(
            f"{what}; send a text, a list of texts, a list of token ids, or a list of such lists.",
            param="prompt",
        )


class ChatTemplateFields(BaseModel):
    """How messages become a prompt."""

    messages: Objects
    tools: Objects | None = None
    documents: Objects | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None


class ChatBody(ChatTemplateFields, GenerationBody):
    """``POST /v1/chat/completions``."""

    max_completion_tokens: Int64 | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: str | dict[str, Any] | None = None
    echo: bool | None = None

    def refuse_unsupported(self) -> None:
        """Also refuse tools that the model may be expected to call.

        Raises:
            RequestError: a field would change the result and is not supported.
        """
        super().refuse_unsupported()
        if self.tools and self.tool_choice != "none":
            raise RequestError(
                "Tool calls are not supported. Leave tools out, or send tool_choice 'none' to show them to the model.",
                param="tools",
            )
        if self.tool_choice not in (None, "none", "auto"):
            raise RequestError("Tool calls are not supported; tool_choice can only be 'none'.", param="tool_choice")

    @property
    def output_limit(self) -> tuple[int | None, str]:
        """The most tokens to generate, and the field that says so."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"


class TokenizeBody(RequestBody):
    """``POST /tokenize`` with a text."""

    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatBody(ChatTemplateFields, RequestBody):
    """``POST /tokenize`` with messages."""

    return_token_strs: bool | None = None


class DetokenizeBody(RequestBody):
    """``POST /detokenize``."""

    tokens: Integers


def _check_response_format(value: Any) -> None:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str):
        raise RequestError("response_format must be an object with a type.", param="response_format")
    if kind != "text":
        raise RequestError(
            f"response_format {kind!r} is not supported, only 'text'. Ask for the format in the prompt.",
            param="response_format",
        )


def _wrong(prompt: Any) -> str:
    """What is wrong with what is no prompt: in a list, the first item unlike the others or unlike any prompt."""
    if not isinstance(prompt, list) or not prompt:
        return "prompt is an empty list" if prompt == [] else f"prompt is {_shown(prompt)}"
    for i, item in enumerate(prompt):
        if type(item) is not type(prompt[0]) or not (type(item) in (str, int) or isinstance(item, list)):
            return f"prompt[{i}] is {_shown(item)}"
    return "prompt is a list of lists that hold more than token ids"


def _is_token_ids(values: Sequence[Any]) -> bool:
    return all(type(value) is int for value in values)


def _strings(value: str | list[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _token_biases(value: dict[str, float] | None) -> dict[int, float] | None:
    if not value:
        return None
    biases = {}
    for token, bias in value.items():
        try:
            biases[int(token)] = bias
        except ValueError:
            message = f"logit_bias has the key {token[:40]!r}; its keys are token ids."
            raise RequestError(message, param="logit_bias") from None
    return biases


def _request_error(errors: Sequence[ErrorDetails]) -> RequestError:
    """pydantic's first complaint, with the field in the API's spelling.

    A field that may have several types gets one complaint per type; the one that came furthest is the helpful one.
    """
    same_field = [error for error in errors if error["loc"][:1] == errors[0]["loc"][:1]]
    error = max(same_field, key=lambda error: len(error["loc"]))
    if error["type"] == "json_invalid":
        return RequestError(f"The body is not valid JSON: {error['ctx']['error']}.", code="invalid_json")
    path = _path(error["loc"])
    if error["type"] == "missing":
        return RequestError(f"{path} is missing.", param=path)
    as_far = (other for other in same_field if len(other["loc"]) == len(error["loc"]))
    kinds = [other["msg"].removeprefix("Input should be ") for other in as_far]
    message = f"{path or 'The body'} is {_shown(error['input'])}; it must be {' or '.join(dict.fromkeys(kinds))}."
    return RequestError(message, param=path or None)


def _shown(value: Any) -> str:
    """A value as the client wrote it, or what kind it is of, if it may be long."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _path(location: Sequence[int | str]) -> str:
    """``("messages", 0, "content")`` -> ``"messages[0].content"``, without pydantic's names of union members."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in _UNION_MEMBERS and "[" not in part:
            path += f".{part}" if path else part
    return path


_UNION_MEMBERS = frozenset({"str", "int", "float", "bool"})
_SHOWN = 40
"""Characters of a wrong value that a message repeats."""
