"""Service: what every route needs: the served model, admission, and generation."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from dovetail.config import EngineConfig
from dovetail.contracts.executor import ExecutorInfo
from dovetail.engine.client import EngineClient
from dovetail.engine.processor import OutputProcessor, Update
from dovetail.engine.tokenizer import Tokenizer
from dovetail.errors import (
    ContextLengthError,
    EngineDeadError,
    EngineOverloadedError,
    RequestError,
    UnknownModelError,
)
from dovetail.messages import EngineRequest
from dovetail.options import ServerOptions
from dovetail.plugins.registry import PluginStatus
from dovetail.sampling_params import SamplingParams
from dovetail.server.errors import ApiError
from dovetail.server.metrics import Metrics, RequestWatch

_LONG = 4096
"""Characters, or tokens, from which on (de)tokenizing takes a thread, so that other requests do not wait."""


class Phase(StrEnum):
    """Where the server is in its life."""

    STARTING = "starting"
    READY = "ok"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """The model behind the API.

    Attributes:
        name: what clients call it.
        defaults: sampling parameters that the checkpoint recommends.
        asked: options of the engine that differ from their defaults.
        created: Unix time.
    """

    name: str
    tokenizer: Tokenizer
    config: EngineConfig
    info: ExecutorInfo
    defaults: Mapping[str, Any]
    asked: Mapping[str, Any] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    def check_context(self, prompt_tokens: int, output_tokens: int | None, param: str) -> None:
        """Refuse what cannot fit, before anything runs.

        Args:
            output_tokens: what the request asks for; None takes what there is room for.
            param: the field that asks for them.

        Raises:
            ContextLengthError: prompt plus output exceed the context.
        """
        limit = self.config.max_model_len
        wanted = output_tokens or 1
        if prompt_tokens + wanted <= limit:
            return
        raise ContextLengthError(
            f"This model's maximum context length is {limit} tokens. However, you requested "
            f"{prompt_tokens + wanted} tokens ({prompt_tokens} in the prompt, {wanted} for the output). "
            "Shorten the prompt or ask for fewer output tokens.",
            param=param,
        )


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and the text they came from, if they did."""

    token_ids: list[int]
    text: str | None


Updates = AsyncGenerator[tuple[int, Update], None]
"""Index of the prompt, and what happened to it."""


class Service:
    """One per server.

    Attributes:
        phase: decides who is let in.
        model: None until the engine is ready.
        plugins: what became of each; empty until they are discovered.
    """

    def __init__(self, options: ServerOptions, client: EngineClient, metrics: Metrics) -> None:
        self.options = options
        self.client = client
        self.metrics = metrics
        self.phase = Phase.STARTING
        self.model: ServedModel | None = None
        self.plugins: tuple[PluginStatus, ...] = ()
        self._processor: OutputProcessor | None = None
        # One thread: tokenizing two texts at once would only take more from the engine.
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

    def note_plugins(self, plugins: tuple[PluginStatus, ...]) -> None:
        """Discovery is over."""
        self.plugins = plugins
        self.metrics.set_plugins(plugins)

    def open(self, model: ServedModel) -> None:
        """Let requests in."""
        config = model.config
        self._processor = OutputProcessor(
            model.tokenizer, config.eos_token_ids, config.vocab_size, config.max_model_len
        )
        self.model = model
        self.metrics.ready(model.name, config, model.info)
        self.phase = Phase.READY

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def served(self, name: str | None = None) -> ServedModel:
        """The model, if clients may use it now.

        Args:
            name: what the client calls it; None takes what there is.

        Raises:
            EngineOverloadedError: the server starts or drains. EngineDeadError: the engine is gone.
            UnknownModelError: no model of that name is served.
        """
        if self.client.dead.is_set():
            raise EngineDeadError(self.client.cause)
        if self.phase is Phase.STARTING or self.model is None:
            raise EngineOverloadedError("The server is still loading the model; try again soon.")
        if self.phase is not Phase.READY:
            raise EngineOverloadedError("The server is shutting down; ask another one.")
        if name is not None and name != self.model.name:
            raise UnknownModelError(name, [self.model.name])
        return self.model

    @property
    def max_body_bytes(self) -> int:
        """Largest request body."""
        return int(self.options.max_body_mb * 1e6)

    def check_batch(self, prompts: int, n: int) -> None:
        """Refuse more prompts at once than may ever run and wait here.

        Raises:
            RequestError: there are too many.
        """
        most = self.served().config.max_num_seqs + self.options.max_waiting
        if prompts > 1 and prompts * n > most:
            raise RequestError(
                f"{prompts} prompts with {n} completions each are more than the {most} requests that this server runs "
                "and keeps waiting; send fewer prompts at a time.",
                param="prompt",
            )

    def truncated(self, token_ids: list[int], keep: int | None, output_tokens: int | None) -> list[int]:
        """The end of a prompt, for ``truncate_prompt_tokens``: ``keep`` tokens, or with -1 what there is room for.

        Raises:
            RequestError: ``keep`` is neither -1 nor positive.
        """
        if keep is None:
            return token_ids
        if keep == -1:
            keep = max(1, self.served().config.max_model_len - (output_tokens or 1))
        if keep < 1:
            raise RequestError(
                f"truncate_prompt_tokens is {keep}; it must be -1 or at least 1.", param="truncate_prompt_tokens"
            )
        return token_ids if len(token_ids) <= keep else token_ids[-keep:]

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        tokenizer = self.served().tokenizer
        if len(text) < _LONG:
            return tokenizer.encode(text, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, tokenizer.encode, text, add_special_tokens)

    async def decode(self, token_ids: list[int]) -> str:
        """The text of token ids, special ones included."""
        tokenizer = self.served().tokenizer
        if len(token_ids) < _LONG:
            return tokenizer.decode(token_ids, False)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, tokenizer.decode, token_ids, False)

    async def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Updates:
        """Run prompts together and yield what happens to them, until each has its ``params.n`` completions.

        Everything that can be refused is refused before the first update. Closing the iterator frees what is
        still running.

        Raises:
            RequestError: a prompt or a parameter does not fit.
            EngineOverloadedError: too many requests wait, or the server is shutting down.
            EngineDeadError: the engine is gone.
        """
        self.served()
        self._check_queue()
        processor = self._processor
        assert processor is not None
        unique = uuid.uuid4().hex
        indices = {f"{unique}-{i}": i for i in range(len(prompts))}
        arrival = time.time()
        try:
            requests = [
                request
                for request_id, i in indices.items()
                for request in processor.add(
                    request_id,
                    prompts[i].token_ids,
                    params,
                    prompt=prompts[i].text,
                    priority=priority,
                    arrival_time=arrival,
                    cache_salt=cache_salt,
                )
            ]
            lengths = [len(prompt.token_ids) for prompt in prompts]
            with closing(RequestWatch(self.metrics, lengths, params.n)) as watch:
                async with aclosing(self._run(requests)) as updates:
                    async for request_id, update in updates:
                        index = indices[request_id]
                        watch.update(index, update.delta)
                        _raise_failure(update)
                        yield index, update
        finally:
            processor.abort(indices)

    async def _run(self, requests: list[EngineRequest]) -> AsyncGenerator[tuple[str, Update], None]:
        """Updates by request id, until every completion has ended."""
        assert self._processor is not None
        unfinished = len(requests)
        async with aclosing(self.client.generate(requests)) as deltas:
            async for delta in deltas:
                update = self._processor.process(delta)
                if update is None:
                    continue
                self.client.abort(update.abort)
                yield update.output.request_id, update
                unfinished -= update.delta.finish_reason is not None
                if not unfinished:
                    return

    def _check_queue(self) -> None:
        assert self.model is not None
        live, slots = self.client.num_live, self.model.config.max_num_seqs
        queued = max(self.client.stats.num_waiting, live - slots)
        if live >= slots and queued >= self.options.max_waiting:
            raise EngineOverloadedError(
                f"{queued} requests wait already, and --max-waiting is {self.options.max_waiting}; try again soon."
            )


def _raise_failure(update: Update) -> None:
    """An end that is no answer."""
    reason = update.delta.finish_reason
    if reason == "error":
        raise ApiError(500, update.output.error or "The engine failed on this request.", code="generation_failed")
    if reason == "abort":
        raise EngineOverloadedError("The server is shutting down and ended this request; ask another one.")
