"""How the tokens of one request are chosen and when generation stops."""

from __future__ import annotations

import math

import msgspec

from dovetail.errors import RequestError

MAX_LOGPROBS = 20
MAX_STOPS = 128
"""Stop strings of one request. Each is looked for in every piece of text, while other requests wait."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling parameters of one request. Names and meanings follow vLLM and OpenAI.

    Attributes:
        n: number of independent completions of the prompt, ≥ 1.
        max_tokens: most tokens to generate; None means up to the context's end.
        min_tokens: end-of-sequence and stop tokens are masked until this many tokens exist.
        temperature: 0 is greedy; else logits are divided by it.
        top_p: smallest set of tokens whose probability reaches it, in (0, 1].
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        min_p: drop tokens below ``min_p × max probability``, in [0, 1].
        presence_penalty, frequency_penalty: subtracted for tokens already generated, in [-2, 2].
        repetition_penalty: divides (positive) or multiplies (negative) logits of tokens in prompt or output, > 0.
        seed: same seed, same tokens, alone or in a batch, on any day; None draws one.
        stop: strings that end generation, at most 128; matched across token boundaries.
        stop_token_ids: token ids that end generation.
        include_stop_str_in_output: keep the stop string in the text.
        ignore_eos: the model's end-of-sequence tokens do not stop.
        logit_bias: token id -> value added to its logit.
        allowed_token_ids: if given, every other token is masked.
        logprobs: number of most likely tokens to report per generated token; the chosen one is always included.
        prompt_logprobs: the same for prompt tokens.
        skip_special_tokens: leave special tokens out of the text.
        detokenize: False leaves the text empty (token ids only).
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        """Check every range.

        Raises:
            RequestError: naming the parameter, the value and the range.
        """
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "allowed_token_ids"):
            value = getattr(self, name)
            if isinstance(value, list):
                msgspec.structs.force_setattr(self, name, tuple(value))
        _check_range("n", self.n, 1, 128)
        if self.max_tokens is not None:
            _check_range("max_tokens", self.max_tokens, 1, math.inf)
            _check_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_range("min_tokens", self.min_tokens, 0, math.inf)
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_range("top_k", self.top_k, -1, math.inf)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        if self.seed is not None:
            _check_range("seed", self.seed, -(2**63), 2**64 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check_range(name, value, 0, MAX_LOGPROBS)
        if len(self.stop) > MAX_STOPS:
            message = f"stop has {len(self.stop)} strings; at most {MAX_STOPS} are looked for, so send fewer."
            raise RequestError(message, param="stop")
        if "" in self.stop:
            raise RequestError("stop must not contain an empty string; remove it.", param="stop")
        for token, bias in (self.logit_bias or {}).items():
            if not math.isfinite(bias) or not -100.0 <= bias <= 100.0:
                message = f"logit_bias of token {token} is {bias}; it must be in [-100, 100]."
                raise RequestError(message, param="logit_bias")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            message = "allowed_token_ids is empty; name at least one token or leave it out."
            raise RequestError(message, param="allowed_token_ids")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0


def _check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    if math.isnan(value) or value < low or value > high or (open_low and value == low):
        bracket = "(" if open_low else "["
        bound = f"{bracket}{low}, {'∞)' if high == math.inf else f'{high}]'}"
        raise RequestError(f"{name} is {value}; it must be in {bound}.", param=name)
