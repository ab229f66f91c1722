"""``POST /v1/completions``."""

from __future__ import annotations

import time
from contextlib import aclosing

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from dovetail.engine.outputs import LogprobsAtPosition, RequestOutput
from dovetail.engine.processor import CompletionDelta, Update
from dovetail.errors import RequestError
from dovetail.sampling_params import SamplingParams
from dovetail.server.body import read_body
from dovetail.server.logprobs import LogprobsWriter
from dovetail.server.protocol import CompletionBody
from dovetail.server.responses import Completion, CompletionChoice, CompletionLogprobs, Usage
from dovetail.server.service import Prompt, ServedModel, Service
from dovetail.server.sse import DONE, EventStream, event, or_disconnect
from dovetail.server.usage import usage

_DEFAULT_MAX_TOKENS = 16


async def create_completion(request: Request) -> Response:
    """The route."""
    service: Service = request.app.state.service
    body = CompletionBody.from_json(await read_body(request, service.max_body_bytes))
    return await or_disconnect(request, _respond(service, body, f"cmpl-{request.state.request_id}"))


async def _respond(service: Service, body: CompletionBody, response_id: str) -> Response:
    model = service.served(body.model)
    params = _sampling_params(body, model)
    given = body.prompts()
    service.check_batch(len(given), params.n)
    prompts = [await _encoded(service, body, prompt) for prompt in given]
    for prompt in prompts:
        model.check_context(len(prompt.token_ids), body.max_tokens, "max_tokens" if body.max_tokens else "prompt")
    updates = service.generate(prompts, params, priority=body.priority or 0, cache_salt=body.cache_salt)
    writer = CompletionWriter(body, model, prompts, params, response_id)
    if body.stream:
        return await EventStream.start(updates, writer)
    async with aclosing(updates):
        async for index, update in updates:
            writer.note(index, update)
    return Response(msgspec.json.encode(writer.whole()), media_type="application/json")


def _sampling_params(body: CompletionBody, model: ServedModel) -> SamplingParams:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError(
            f"best_of is {body.best_of}; only the value of n ({body.n or 1}) is supported.", param="best_of"
        )
    default = model.defaults.get("max_tokens", _DEFAULT_MAX_TOKENS)
    return body.sampling_params(
        model.defaults,
        max_tokens=default if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo and body.logprobs is not None else body.prompt_logprobs,
    )


async def _encoded(service: Service, body: CompletionBody, prompt: str | list[int]) -> Prompt:
    if isinstance(prompt, str):
        token_ids = await service.encode(prompt, body.add_special_tokens is not False)
    else:
        token_ids = prompt
    kept = service.truncated(token_ids, body.truncate_prompt_tokens, body.max_tokens)
    return Prompt(kept, prompt if isinstance(prompt, str) and kept is token_ids else None)


class CompletionWriter:
    """Writes one request's response, whole or in chunks.

    Args:
        params: what the request's completions run with.
        response_id: the same in every chunk.
    """

    def __init__(
        self,
        body: CompletionBody,
        model: ServedModel,
        prompts: list[Prompt],
        params: SamplingParams,
        response_id: str,
    ) -> None:
        self._body = body
        self._model = model
        self._prompts = prompts
        self._params = params
        self._id = response_id
        self._created = int(time.time())
        self._outputs: dict[int, RequestOutput] = {}
        self._offsets: dict[int, int] = {}
        self._logprobs = LogprobsWriter(model.tokenizer, bool(body.return_tokens_as_token_ids))

    def note(self, prompt: int, update: Update) -> None:
        """Keep the state of a prompt for :meth:`whole`."""
        self._outputs[prompt] = update.output

    def whole(self) -> Completion:
        """The response, when everything is finished; choices in the order of the prompts."""
        choices = []
        for prompt, output in sorted(self._outputs.items()):
            for choice in output.outputs:
                delta = CompletionDelta(
                    choice.index,
                    choice.text,
                    choice.token_ids,
                    choice.logprobs,
                    choice.finish_reason,
                    choice.stop_reason,
                )
                choices.append(self._choice(prompt, output, delta))
        return self._envelope(choices, usage=usage(self._outputs.values()))

    def chunk(self, prompt: int, update: Update) -> bytes:
        """The event for one update."""
        self.note(prompt, update)
        chunk = self._envelope([self._choice(prompt, update.output, update.delta)])
        if self._body.continuous_usage:
            chunk.usage = usage(self._outputs.values())
        elif self._body.include_usage:
            chunk.usage = None
        return event(chunk)

    def end(self) -> bytes:
        """The usage, if asked for, and the end mark."""
        if not self._body.include_usage:
            return DONE
        return event(self._envelope([], usage=usage(self._outputs.values()))) + DONE

    def _envelope(self, choices: list[CompletionChoice], usage: Usage | UnsetType = UNSET) -> Completion:
        return Completion(
            id=self._id, created=self._created, model=self._model.name, choices=choices, usage=usage
        )

    def _choice(self, prompt: int, output: RequestOutput, delta: CompletionDelta) -> CompletionChoice:
        index = prompt * self._params.n + delta.index
        first = index not in self._offsets
        echo = bool(self._body.echo) and first
        choice = CompletionChoice(
            index=index,
            text=(self._prompt_text(prompt) if echo else "") + delta.text,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            logprobs=self._columns(index, output, delta, echo),
        )
        self._offsets.setdefault(index, 0)
        if self._body.return_token_ids:
            choice.token_ids = delta.token_ids
            choice.prompt_token_ids = output.prompt_token_ids if first else UNSET
        if self._body.prompt_logprobs is not None and first:
            choice.prompt_logprobs = self._logprobs.prompt(output.prompt_logprobs)
        return choice

    def _columns(
        self, index: int, output: RequestOutput, delta: CompletionDelta, echo: bool
    ) -> CompletionLogprobs | None:
        if self._params.logprobs is None:
            return None
        token_ids = delta.token_ids
        positions: list[LogprobsAtPosition | None] = list(delta.logprobs or ())
        if echo:
            token_ids = output.prompt_token_ids + token_ids
            positions = list(output.prompt_logprobs or ()) + positions
        columns = self._logprobs.completion(token_ids, positions, self._offsets.get(index, 0))
        if columns.tokens:
            self._offsets[index] = columns.text_offset[-1] + len(columns.tokens[-1])
        return columns

    def _prompt_text(self, prompt: int) -> str:
        text = self._prompts[prompt].text
        if text is not None:
            return text
        token_ids = self._prompts[prompt].token_ids
        return self._model.tokenizer.decode(token_ids, self._params.skip_special_tokens)
