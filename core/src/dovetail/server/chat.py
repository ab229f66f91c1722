"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from contextlib import aclosing
from typing import Any

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from dovetail.engine.outputs import LogprobsAtPosition, RequestOutput
from dovetail.engine.processor import CompletionDelta, Update
from dovetail.errors import RequestError
from dovetail.sampling_params import MAX_LOGPROBS, SamplingParams
from dovetail.server.body import read_body
from dovetail.server.logprobs import LogprobsWriter
from dovetail.server.protocol import ChatBody, ChatTemplateFields
from dovetail.server.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
)
from dovetail.server.service import Prompt, ServedModel, Service
from dovetail.server.sse import DONE, EventStream, event, or_disconnect
from dovetail.server.usage import usage

ROLE = "assistant"

_FIELDS = ChatTemplateFields.model_fields.keys()


async def create_chat_completion(request: Request) -> Response:
    """The route."""
    service: Service = request.app.state.service
    body = ChatBody.from_json(await read_body(request, service.max_body_bytes))
    return await or_disconnect(request, _respond(service, body, f"chatcmpl-{request.state.request_id}"))


async def _respond(service: Service, body: ChatBody, response_id: str) -> Response:
    model = service.served(body.model)
    params = _sampling_params(body, model)
    limit, field = body.output_limit
    token_ids = await service.encode(render(body, model), bool(body.add_special_tokens))
    token_ids = service.truncated(token_ids, body.truncate_prompt_tokens, limit)
    model.check_context(len(token_ids), limit, field if limit else "messages")
    updates = service.generate(
        [Prompt(token_ids, None)], params, priority=body.priority or 0, cache_salt=body.cache_salt
    )
    writer = ChatWriter(body, model, params, response_id)
    if body.stream:
        return await EventStream.start(updates, writer)
    async with aclosing(updates):
        async for index, update in updates:
            writer.note(index, update)
    return Response(msgspec.json.encode(writer.whole()), media_type="application/json")


def render(body: ChatTemplateFields, model: ServedModel) -> str:
    """The prompt of a conversation.

    Raises:
        RequestError: malformed messages, or the template rejects them.
    """
    kwargs: dict[str, Any] = dict(body.chat_template_kwargs or {})
    for name in kwargs.keys() & _FIELDS:
        raise RequestError(
            f"chat_template_kwargs must not set {name!r}; it is a field of its own.", param="chat_template_kwargs"
        )
    if body.documents:
        kwargs["documents"] = body.documents
    messages = body.messages
    if not model.tokenizer.template_mentions("developer"):
        # The newer name of the system role, which most templates have never heard of.
        messages = [{**m, "role": "system"} if m.get("role") == "developer" else m for m in messages]
    for i, message in enumerate(messages):
        if message.get("content") is None and message.get("role") != ROLE:
            raise RequestError(f"messages[{i}].content is missing.", param=f"messages[{i}].content")
    return model.tokenizer.apply_chat_template(
        messages,
        body.tools,
        add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
        continue_final_message=bool(body.continue_final_message),
        **kwargs,
    )


def _sampling_params(body: ChatBody, model: ServedModel) -> SamplingParams:
    top = body.top_logprobs
    if top is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
    if top is not None and not 0 <= top <= MAX_LOGPROBS:
        raise RequestError(f"top_logprobs is {top}; it must be in [0, {MAX_LOGPROBS}].", param="top_logprobs")
    limit, field = body.output_limit
    try:
        return body.sampling_params(
            model.defaults,
            max_tokens=model.defaults.get("max_tokens") if limit is None else limit,
            logprobs=(top or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
        )
    except RequestError as error:
        if error.param == "max_tokens":
            raise RequestError(str(error).replace("max_tokens", field, 1), param=field) from None
        raise


class ChatWriter:
    """Writes one request's response, whole or in chunks.

    Args:
        params: what the answers run with.
        response_id: the same in every chunk.
    """

    def __init__(self, body: ChatBody, model: ServedModel, params: SamplingParams, response_id: str) -> None:
        self._body = body
        self._model = model
        self._id = response_id
        self._created = int(time.time())
        self._wants_logprobs = params.logprobs is not None
        self._echo = _final_words(body) if body.echo else ""
        self._output: RequestOutput | None = None
        self._begun: set[int] = set()
        self._logprobs = LogprobsWriter(model.tokenizer, bool(body.return_tokens_as_token_ids))

    def note(self, prompt: int, update: Update) -> None:
        """Keep the state for :meth:`whole`."""
        self._output = update.output

    def whole(self) -> ChatCompletion:
        """The response, when every answer is finished."""
        output = self._output
        assert output is not None
        response = ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model.name,
            choices=[
                ChatChoice(
                    index=choice.index,
                    message=ChatMessage(ROLE, self._echo + choice.text),
                    logprobs=self._written(choice.token_ids, choice.logprobs),
                    finish_reason=choice.finish_reason,
                    stop_reason=choice.stop_reason,
                    token_ids=choice.token_ids if self._body.return_token_ids else UNSET,
                )
                for choice in output.outputs
            ],
            usage=usage([output]),
        )
        self._add_prompt(response, output)
        return response

    def chunk(self, prompt: int, update: Update) -> bytes:
        """The event for one update."""
        self.note(prompt, update)
        chunk = self._envelope([self._choice(update.delta)])
        if not self._begun:
            self._add_prompt(chunk, update.output)
        self._begun.add(update.delta.index)
        if self._body.continuous_usage:
            chunk.usage = usage([update.output])
        elif self._body.include_usage:
            chunk.usage = None
        return event(chunk)

    def end(self) -> bytes:
        """The usage, if asked for, and the end mark."""
        if not self._body.include_usage or self._output is None:
            return DONE
        chunk = self._envelope([])
        chunk.usage = usage([self._output])
        return event(chunk) + DONE

    def _envelope(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(id=self._id, created=self._created, model=self._model.name, choices=choices)

    def _choice(self, delta: CompletionDelta) -> ChatChunkChoice:
        first = delta.index not in self._begun
        return ChatChunkChoice(
            index=delta.index,
            delta=ChatDelta(ROLE, self._echo + delta.text) if first else ChatDelta(UNSET, delta.text),
            logprobs=self._written(delta.token_ids, delta.logprobs),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if self._body.return_token_ids else UNSET,
        )

    def _written(self, token_ids: list[int], logprobs: list[LogprobsAtPosition] | None) -> ChatLogprobs | None:
        if not self._wants_logprobs:
            return None
        return self._logprobs.chat(token_ids, logprobs or (), self._body.top_logprobs or 0)

    def _add_prompt(self, response: ChatCompletion | ChatChunk, output: RequestOutput) -> None:
        if self._body.return_token_ids:
            response.prompt_token_ids = output.prompt_token_ids
        if self._body.prompt_logprobs is not None:
            response.prompt_logprobs = self._logprobs.prompt(output.prompt_logprobs)


def _final_words(body: ChatBody) -> str:
    """The last message's text, if it is the assistant's own."""
    last = body.messages[-1]
    content = last.get("content")
    return content if last.get("role") == ROLE and isinstance(content, str) else ""
