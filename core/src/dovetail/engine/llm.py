"""LLM: the engine in this process, for scripts and notebooks."""

from __future__ import annotations

import gc
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypedDict

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dovetail import checkpoint
from dovetail.config import EngineConfig
from dovetail.contracts.executor import Executor
from dovetail.engine import effective
from dovetail.engine.chat_template import Message
from dovetail.engine.engine import Engine
from dovetail.engine.generation_config import recommended_params
from dovetail.engine.outputs import RequestOutput
from dovetail.engine.processor import OutputProcessor
from dovetail.engine.startup_progress import StartupProgress
from dovetail.engine.tokenizer import Tokenizer
from dovetail.errors import EngineDeadError, RequestError
from dovetail.messages import EngineStats
from dovetail.options import EngineOptions, asked, parse
from dovetail.sampling_params import SamplingParams


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt as token ids."""

    prompt_token_ids: list[int]


Prompt = str | list[int] | TextPrompt | TokensPrompt
Params = SamplingParams | Sequence[SamplingParams] | None
ExecutorFactory = Callable[[EngineConfig], Executor]

_logger = logging.getLogger("dovetail.engine")


class LLM:
    """A model, loaded in this process. Use it from one thread, and close it (or use it as a context manager).

    Args:
        model: checkpoint folder or hub id; without one, the embedded demo model.
        tokenizer: folder or hub id of the tokenizer, if it is not beside the model.
        chat_template: a Jinja program, or the path of one, that replaces the checkpoint's.
        executor_factory: makes the executor; default: the device of this process.
        options: any further field of :class:`dovetail.options.EngineOptions`, such as ``dtype="float32"``.

    Raises:
        ConfigError: an unknown option, or options that cannot be honoured.
        ModelLoadError: the checkpoint does not fit the model.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        tokenizer: str | Path | None = None,
        chat_template: str | None = None,
        executor_factory: ExecutorFactory | None = None,
        **options: Any,
    ) -> None:
        named = {"model": _text(model), "tokenizer": _text(tokenizer), **options}
        given = parse(EngineOptions, named)
        config = _resolve(given)
        folder = config.model_path if tokenizer is None else checkpoint.locate_tokenizer(str(tokenizer))
        self.config = config
        self._tokenizer = Tokenizer.from_folder(folder, chat_template)
        self._processor = OutputProcessor(
            self._tokenizer, config.eos_token_ids, config.vocab_size, config.max_model_len
        )
        self._recommended = recommended_params(Path(config.model_path))
        self._count = 0
        self._failure: BaseException | None = None
        executor = (executor_factory or _local_executor)(config)
        try:
            with StartupProgress.shown(Console(stderr=True)) as progress:
                info = executor.load(progress)
            for line in effective.lines(list(effective.rows(config, info, asked(given)))):
                _logger.info("%s", line)
            self._engine = Engine(config, executor, info)
        except BaseException:
            executor.close()
            raise
        gc.collect()
        gc.freeze()  # what start-up made stays until close(): each look at it would cost many steps

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the device. Idempotent; nothing else may be called afterwards."""
        self._engine.close()
        gc.unfreeze()

    def stats(self) -> EngineStats:
        """Counters and gauges of the engine: steps, preemptions, prefix hits, drafts proposed and accepted."""
        return self._engine.stats()

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What is used when no parameters are given: the checkpoint's recommendations, else the defaults."""
        return SamplingParams(**self._recommended)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, all of them at the same time.

        Args:
            prompts: one or several of: text, token ids, ``{"prompt": text}``, ``{"prompt_token_ids": ids}``.
            sampling_params: for all prompts, or one per prompt.
            use_tqdm: show a progress bar on an interactive terminal.
            priority: one per prompt; lower runs first under the priority policy.

        Returns:
            One output per prompt, in order.

        Raises:
            RequestError: a prompt or its parameters cannot run; then nothing has run.
        """
        listed = _as_list(prompts)
        return self._run([self._encoded(prompt) for prompt in listed], sampling_params, use_tqdm, priority)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several at the same time; each output's ``prompt`` is what the template wrote.

        Raises:
            RequestError: as :meth:`generate`, or the chat template rejects the messages.
        """
        if not messages:
            raise RequestError("messages is empty; send at least one message.", param="messages")
        conversations: Any = [messages] if isinstance(messages[0], Mapping) else messages
        prompts: list[tuple[str | None, list[int]]] = []
        for conversation in conversations:
            text = self._tokenizer.apply_chat_template(
                conversation, tools, add_generation_prompt, continue_final_message, **(chat_template_kwargs or {})
            )
            prompts.append((text, self._tokenizer.encode(text, add_special_tokens=False)))
        return self._run(prompts, sampling_params, use_tqdm, None)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Complete one prompt, step by step: each output holds everything so far; the last one is finished.

        Leaving the loop early aborts the request.

        Raises:
            RequestError: the prompt or its parameters cannot run; raised here, before the first output.
        """
        params = sampling_params or self.get_default_sampling_params()
        (output,) = self._add([self._encoded(prompt)], [params], [0])
        return self._stream(output)

    def _stream(self, output: RequestOutput) -> Iterator[RequestOutput]:
        seen = 0
        try:
            while True:
                tokens = sum(len(completion.token_ids) for completion in output.outputs)
                if tokens == seen and not output.finished:
                    self._step()
                    continue
                seen, latest = tokens, _copy(output)
                yield latest
                if latest.finished:
                    return
        finally:
            self._abort([output.request_id])

    def _run(
        self,
        prompts: list[tuple[str | None, list[int]]],
        sampling_params: Params,
        use_tqdm: bool,
        priority: Sequence[int] | None,
    ) -> list[RequestOutput]:
        params = self._one_per_prompt(sampling_params, len(prompts))
        if priority is not None and len(priority) != len(prompts):
            raise RequestError(
                f"There are {len(prompts)} prompts but {len(priority)} priorities; give one per prompt.",
                param="priority",
            )
        outputs = self._add(prompts, params, priority or [0] * len(prompts))
        try:
            with _progress_bar(len(outputs), use_tqdm) as advance:
                while not all(output.finished for output in outputs):
                    advance(self._step())
        finally:
            self._abort([output.request_id for output in outputs])
        return outputs

    def _one_per_prompt(self, sampling_params: Params, count: int) -> Sequence[SamplingParams]:
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            return [sampling_params or self.get_default_sampling_params()] * count
        if len(sampling_params) != count:
            raise RequestError(
                f"There are {count} prompts but {len(sampling_params)} sampling parameters; give one for all, or "
                "one per prompt.",
                param="sampling_params",
            )
        return sampling_params

    def _encoded(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """The prompt's text, if it came as text, and its token ids, which the caller cannot change."""
        if isinstance(prompt, str):
            return prompt, self._tokenizer.encode(prompt)
        if isinstance(prompt, list):
            return None, prompt.copy()
        if isinstance(prompt, Mapping):
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            if isinstance(ids, list):
                return text if isinstance(text, str) else None, ids.copy()
            if isinstance(text, str):
                return text, self._tokenizer.encode(text)
        raise RequestError(
            f"A prompt must be text, a list of token ids, or a mapping with 'prompt' or 'prompt_token_ids'; "
            f"this is a {type(prompt).__name__}: {prompt!r:.80}.",
            param="prompt",
        )

    def _add(
        self,
        prompts: Sequence[tuple[str | None, list[int]]],
        params: Sequence[SamplingParams],
        priority: Sequence[int],
    ) -> list[RequestOutput]:
        """Queue all, or none if one of them cannot run."""
        if self._failure is not None:
            message = "An earlier step failed, and with it this engine; make a new LLM."
            raise EngineDeadError(message) from self._failure
        outputs: list[RequestOutput] = []
        try:
            for (text, ids), one, rank in zip(prompts, params, priority, strict=True):
                request_id = str(self._count)
                self._count += 1
                requests = self._processor.add(request_id, ids, one, prompt=text, priority=rank)
                outputs.append(self._processor.output(request_id))
                for request in requests:
                    self._engine.add(request, prompt_checked=True)
        except BaseException:
            self._abort([output.request_id for output in outputs])
            raise
        return outputs

    def _step(self) -> int:
        """One step of the engine, for everyone; returns how many user requests it finished."""
        before = len(self._processor)
        assert self._engine.has_work(), f"{before} requests wait, but the engine has no work"
        with _interrupts_deferred():
            try:
                deltas = self._engine.step()
            except Exception as error:
                self._failure = error
                raise
            for delta in deltas:
                update = self._processor.process(delta)
                if update is not None and update.abort:
                    self._engine.abort(update.abort)
        return before - len(self._processor)

    def _abort(self, request_ids: Sequence[str]) -> None:
        """Make the engine forget what is not finished."""
        live = self._processor.abort(request_ids)
        if live and self._failure is None:
            self._engine.abort(live)


def _resolve(options: EngineOptions) -> EngineConfig:
    # Imported here: they import torch, and `from dovetail import LLM` should be quick.
    from dovetail.plugins.host import PluginHost
    from dovetail.resolver import resolve

    return resolve(options, PluginHost().discover().registries)


def _local_executor(config: EngineConfig) -> Executor:
    from dovetail.runner.executor import LocalExecutor

    return LocalExecutor(config)


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of integers is one prompt; any other list holds several."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if isinstance(prompts, list) and prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]
    return list(prompts)  # type: ignore[arg-type]


def _copy(output: RequestOutput) -> RequestOutput:
    """A copy that later steps do not change."""
    outputs = [
        replace(
            completion,
            token_ids=list(completion.token_ids),
            logprobs=None if completion.logprobs is None else list(completion.logprobs),
        )
        for completion in output.outputs
    ]
    return replace(output, outputs=outputs)


@contextmanager
def _progress_bar(total: int, wanted: bool) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not (wanted and console.is_terminal)) as bar:
        task = bar.add_task("Processed prompts", total=total)
        yield lambda finished: bar.advance(task, finished)


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Hold back Ctrl-C until the block ends, so that it never cuts a step in half; a second one is not held back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGINT)
    if not callable(previous):
        yield
        return
    pending: list[tuple[int, FrameType | None]] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if pending:
            previous(number, frame)
        pending.append((number, frame))

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pending:
        previous(*pending[0])
