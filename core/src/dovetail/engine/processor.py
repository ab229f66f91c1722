"""OutputProcessor: from the engine's new tokens to what callers see. Torch-free, no threads, no I/O.

One user request becomes ``n`` engine requests; their deltas come back as text, log-probabilities with text, and
finish reasons, gathered in one ``RequestOutput``. ``LLM`` reads the cumulative output, a server the deltas.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from dovetail.engine.detokenizer import Detokenizer
from dovetail.engine.outputs import CompletionOutput, Logprob, LogprobsAtPosition, RequestOutput
from dovetail.engine.stop_strings import StopStrings
from dovetail.engine.tokenizer import Tokenizer
from dovetail.engine.validation import check_prompt
from dovetail.errors import RequestError
from dovetail.messages import EngineRequest, RequestOutputDelta, TokenLogprobs
from dovetail.sampling_params import SamplingParams

_MAX_SEED = 2**64


@dataclass(slots=True)
class CompletionDelta:
    """What one step added to one completion.

    Attributes:
        index: which of the request's ``n`` completions.
        text: new text; what may begin a stop string, or is half a character, comes later.
        token_ids: new tokens.
        logprobs: one entry per new token, if asked for.
        finish_reason, stop_reason: set with the completion's last delta.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[LogprobsAtPosition] | None
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass(slots=True)
class Update:
    """The outcome of one engine delta.

    Attributes:
        output: the request's state; the same object every time, so copy what must not change.
        delta: what is new.
        abort: engine requests to abort, because a stop string ended them.
    """

    output: RequestOutput
    delta: CompletionDelta
    abort: list[str]


@dataclass(slots=True)
class _Request:
    output: RequestOutput
    children: list[str]
    unfinished: int


@dataclass(slots=True)
class _Child:
    parent: _Request
    params: SamplingParams
    output: CompletionOutput
    detokenizer: Detokenizer | None
    stops: StopStrings | None


@dataclass(slots=True)
class OutputProcessor:
    """Requests in flight, and their outputs.

    Args:
        tokenizer: the model's.
        eos_token_ids: the model's end-of-sequence tokens.
        vocab_size: rows of the output head; ids must be below.
        max_model_len: the context's length in tokens.
    """

    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    max_model_len: int
    _requests: dict[str, _Request] = field(default_factory=dict)
    _children: dict[str, _Child] = field(default_factory=dict)
    _token_texts: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        """Requests that are not finished."""
        return len(self._requests)

    def add(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        priority: int = 0,
        arrival_time: float | None = None,
        cache_salt: str | None = None,
    ) -> list[EngineRequest]:
        """Register a request; returns its ``params.n`` engine requests.

        Raises:
            RequestError: the prompt or the parameters do not fit the model, or the id is in use.
        """
        self.check(prompt_token_ids, params)
        if request_id in self._requests:
            message = f"The request id {request_id!r} is in use; choose another."
            raise RequestError(message, param="request_id")
        children = [request_id] if params.n == 1 else [f"{request_id}#{i}" for i in range(params.n)]
        outputs = [CompletionOutput(index=i) for i in range(params.n)]
        output = RequestOutput(
            request_id=request_id, prompt=prompt, prompt_token_ids=prompt_token_ids, outputs=outputs
        )
        parent = self._requests[request_id] = _Request(output, children, params.n)
        for child, completion in zip(children, outputs, strict=True):
            self._children[child] = self._make_child(parent, params, completion)
        arrival = time.time() if arrival_time is None else arrival_time
        return [
            EngineRequest(
                request_id=child,
                prompt_token_ids=prompt_token_ids,
                params=_child_params(params, i),
                eos_token_ids=self.eos_token_ids,
                priority=priority,
                arrival_time=arrival,
                cache_salt=cache_salt,
            )
            for i, child in enumerate(children)
        ]

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Refuse what can never run.

        Raises:
            RequestError: the prompt is empty, an id is outside the vocabulary, or parameters contradict.
            ContextLengthError: the prompt leaves no room for output.
        """
        check_prompt(prompt_token_ids, params, self.vocab_size, self.max_model_len)
        if params.stop and not params.detokenize:
            raise RequestError("stop strings need detokenize=True; use stop_token_ids instead.", param="stop")

    def output(self, request_id: str) -> RequestOutput:
        """The state of a request that is not finished; it is updated in place.

        Raises:
            KeyError: no such request.
        """
        return self._requests[request_id].output

    def process(self, delta: RequestOutputDelta) -> Update | None:
        """Take one engine delta; None if the request is unknown: aborted, or ended by a stop string."""
        child = self._children.get(delta.request_id)
        if child is None:
            return None
        output, token_ids = child.output, delta.new_token_ids
        if not output.token_ids:  # only a first delta has news of the prompt
            self._note_prompt(child, delta)
        text, stop = "", None
        if child.detokenizer is not None:
            text, count, stop = self._text(child, child.detokenizer, delta)
            token_ids = token_ids[:count]
        new = CompletionDelta(
            index=output.index,
            text=text,
            token_ids=token_ids,
            logprobs=None if output.logprobs is None else self._new_logprobs(delta, len(token_ids)),
            finish_reason=delta.finish_reason if stop is None else "stop",
            stop_reason=delta.stop_reason if stop is None else stop,
        )
        _accumulate(output, new)
        if new.finish_reason is not None:
            self._finish(child, delta)
        # A request that ended by itself in the same step needs no abort.
        abort = [delta.request_id] if stop is not None and delta.finish_reason is None else []
        return Update(child.parent.output, new, abort)

    def abort(self, request_ids: Iterable[str]) -> list[str]:
        """Forget requests whose caller is gone; returns engine requests to abort. Unknown ids are ignored."""
        live = []
        for request_id in request_ids:
            request = self._requests.pop(request_id, None)
            if request is not None:
                live += [child for child in request.children if self._children.pop(child, None) is not None]
        return live

    def _make_child(self, parent: _Request, params: SamplingParams, output: CompletionOutput) -> _Child:
        output.logprobs = None if params.logprobs is None else []
        return _Child(
            parent=parent,
            params=params,
            output=output,
            detokenizer=self.tokenizer.detokenizer(params.skip_special_tokens) if params.detokenize else None,
            stops=StopStrings(params.stop, params.include_stop_str_in_output) if params.stop else None,
        )

    def _note_prompt(self, child: _Child, delta: RequestOutputDelta) -> None:
        output = child.parent.output
        if child.output.index == 0:
            output.num_cached_tokens = delta.num_cached_tokens
        if delta.prompt_logprobs is not None:
            output.prompt_logprobs = [
                None if entry is None else self._logprobs(entry) for entry in delta.prompt_logprobs
            ]

    @staticmethod
    def _text(child: _Child, detokenizer: Detokenizer, delta: RequestOutputDelta) -> tuple[str, int, str | None]:
        """The delta's text, how many of its tokens count, and the stop string that was hit."""
        tokens = delta.new_token_ids
        count = len(tokens)
        # The token that made the engine stop is part of the tokens, but of the text only on demand.
        shown = count - (delta.finish_reason == "stop" and not child.params.include_stop_str_in_output)
        if child.stops is None:
            text = detokenizer.push(tokens[:shown] if shown != count else tokens)
            return (text if delta.finish_reason is None else text + detokenizer.flush()), count, None
        return _text_until_stop(child, child.stops, detokenizer, delta, shown)

    def _new_logprobs(self, delta: RequestOutputDelta, count: int) -> list[LogprobsAtPosition]:
        return [self._logprobs(entry) for entry in (delta.logprobs or [])[:count]]

    def _logprobs(self, entry: TokenLogprobs) -> LogprobsAtPosition:
        chosen = Logprob(entry.logprob, entry.rank, self._token_text(entry.token_id))
        result = {entry.token_id: chosen}
        for rank, (token, logprob) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), start=1):
            if token != entry.token_id:
                result[token] = Logprob(logprob, rank, self._token_text(token))
        return result

    def _token_text(self, token_id: int) -> str:
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self.tokenizer.token_text(token_id)
        return text

    def _finish(self, child: _Child, delta: RequestOutputDelta) -> None:
        parent, output = child.parent, child.parent.output
        del self._children[delta.request_id]
        parent.unfinished -= 1
        output.finished = parent.unfinished == 0
        output.times = delta.times or output.times
        output.error = delta.error or output.error
        if output.finished:
            del self._requests[output.request_id]


def _text_until_stop(
    child: _Child, stops: StopStrings, detokenizer: Detokenizer, delta: RequestOutputDelta, shown: int
) -> tuple[str, int, str | None]:
    """Feed the first ``shown`` tokens one by one, to know which one completes a stop string.

    Text before the ``min_tokens``-th token is not searched.
    """
    before, needed = len(child.output.token_ids), child.params.min_tokens
    parts: list[str] = []
    for i in range(shown):
        text = detokenizer.push(delta.new_token_ids[i : i + 1])
        if before + i + 1 < needed:
            parts.append(text)
            continue
        text, stop = stops.push(text)
        parts.append(text)
        if stop is not None:
            return "".join(parts), i + 1, stop
    if delta.finish_reason is not None:
        text, stop = stops.push(detokenizer.flush())
        parts += [text, stops.flush() if stop is None else ""]
        return "".join(parts), len(delta.new_token_ids), stop
    return "".join(parts), shown, None


def _child_params(params: SamplingParams, index: int) -> SamplingParams:
    """One completion's parameters: its own seed, no stop strings, and prompt log-probabilities only once."""
    if params.n == 1 and not params.stop:
        return params
    seed = params.seed
    if seed is not None and seed + index >= _MAX_SEED:
        seed -= _MAX_SEED
    return msgspec.structs.replace(
        params,
        n=1,
        seed=None if seed is None else seed + index,
        stop=(),
        prompt_logprobs=params.prompt_logprobs if index == 0 else None,
    )


def _accumulate(output: CompletionOutput, new: CompletionDelta) -> None:
    output.text += new.text
    output.token_ids += new.token_ids
    if output.logprobs is not None and new.logprobs is not None:
        output.logprobs += new.logprobs
    output.finish_reason = new.finish_reason
    output.stop_reason = new.stop_reason
