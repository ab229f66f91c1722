"""What the user asks for, exactly as on the command line, in a YAML file or as ``LLM(...)`` arguments. Torch-free.

The command line, the YAML file and the reference in the docs are generated from these fields. Options that only some
plugin understands belong to that plugin's own section.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from dovetail.errors import ConfigError

T = TypeVar("T")

DTYPES = ("auto", "bfloat16", "float16", "float32")


def option(default: Any, help: str, *, choices: tuple[str, ...] = (), metavar: str = "") -> Any:
    """A dataclass field that is also a command-line option."""
    return field(default=default, metadata={"help": help, "choices": choices, "metavar": metavar})


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """Options of the engine; ``LLM`` takes the same names."""

    model: str | None = option(
        None, "Checkpoint folder or hub id; without one the embedded demo model is served.", metavar="PATH_OR_HUB_ID"
    )
    revision: str | None = option(None, "Branch, tag or commit of a hub model.")
    tokenizer: str | None = option(
        None, "Folder or hub id of the tokenizer, if it is not beside the model.", metavar="PATH_OR_HUB_ID"
    )
    load_format: str = option(
        "safetensors",
        "Where weights come from; dummy fills them with small random numbers and reads no files, for benchmarks.",
        choices=("safetensors", "dummy"),
    )
    dtype: str = option(
        "auto", "Activation dtype; auto takes the checkpoint's, where the platform computes in it.", choices=DTYPES
    )
    max_model_len: int | None = option(None, "Longest prompt plus output, in tokens; default: the checkpoint's.")
    max_num_seqs: int = option(64, "Most requests computed in one step.")
    max_num_batched_tokens: int = option(2048, "Most tokens computed in one step.")
    block_size: int = option(16, "Tokens per KV-cache block.")
    kv_cache_memory: float | None = option(
        None,
        "GiB for the KV cache; default: max_num_seqs full contexts, at most what memory_fraction leaves of a device's "
        "own memory, or a quarter of the host's free memory.",
    )
    memory_fraction: float | None = option(
        None,
        "Share of the device's own memory that the engine may take in all: weights, steps and KV cache; if given, the "
        "cache takes all that is left of it; default: 0.9.",
    )
    kv_cache_dtype: str = option("auto", "Storage dtype of the KV cache; auto takes the activation dtype.")
    enable_prefix_caching: bool = option(True, "Share KV blocks of equal prompt prefixes.")
    enable_chunked_prefill: bool = option(True, "Split long prompts over steps and mix them with decodes.")
    async_scheduling: bool | None = option(
        None,
        "Plan a step while the one before it runs; default: where the platform computes on its own, and nothing "
        "speculates.",
    )
    scheduling_policy: str = option(
        "fcfs",
        "Order of requests: first come first served, or by the request's priority.",
        choices=("fcfs", "priority"),
    )
    seed: int = option(0, "Seed of requests that bring none.")
    platform: str = option("auto", "Platform plugin; auto takes the highest priority that is available here.")
    platform_config: Mapping[str, Any] | None = option(
        None,
        "The platform's own options as JSON; its page says which it has. On the command line also one by one, as "
        "--<platform>-<name> VALUE.",
        metavar="JSON",
    )
    compile_cache: str | None = option(
        None,
        "Folder that keeps what the platform compiles, for the next start; also read from DOVETAIL_CACHE; default: "
        "dovetail in the user's cache folder.",
        metavar="PATH",
    )
    eager: bool = option(False, "Run each operation as it comes: no steps compiled or recorded as a whole; slower.")
    attention: str = option("auto", "Attention backend; auto takes the platform's first that supports the model.")
    quantization: str | None = option(None, "Weight format; default: what the checkpoint says.")
    speculative_config: Mapping[str, Any] | None = option(
        None,
        "Speculative decoding as JSON: method, num_speculative_tokens, and the method's own options.",
        metavar="JSON",
    )
    num_threads: int | None = option(None, "Host threads for computation; default: the platform's choice.")
    allow_fallback: bool = option(
        False, "If this cannot run as asked, take the nearest configuration that can, and say what was changed."
    )

    def __post_init__(self) -> None:
        """Check what can be checked without looking at model or machine.

        Raises:
            ConfigError: naming the option, its value and the remedy.
        """
        _check_types(self)
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{flag(name)} is {value}; it must be at least 1.")
        if self.kv_cache_memory is not None and not 0 < self.kv_cache_memory < math.inf:
            raise ConfigError(f"--kv-cache-memory is {self.kv_cache_memory}; it must be a positive number of GiB.")
        if self.memory_fraction is not None and not 0 < self.memory_fraction <= 1:
            raise ConfigError(f"--memory-fraction is {self.memory_fraction}; it must be above 0 and at most 1.")
        if self.memory_fraction is not None and self.kv_cache_memory is not None:
            raise ConfigError("--memory-fraction and --kv-cache-memory both size the KV cache; leave out one of them.")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens {self.max_num_batched_tokens} is below --max-num-seqs {self.max_num_seqs}: "
                "a step could not give every request one token. Raise the first or lower the second."
            )
        _check_choices(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerOptions:
    """Options of the HTTP server."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.")
    served_model_name: str | None = option(None, "Name that clients use; default: the model's path or hub id as given.")
    api_key: str | None = option(None, "Key that clients must send as a bearer token; also read from DOVETAIL_API_KEY.")
    chat_template: str | None = option(None, "Jinja file that replaces the checkpoint's chat template.", metavar="PATH")
    max_body_mb: float = option(8.0, "Largest request body accepted, in MB.")
    max_waiting: int = option(1024, "Requests that may wait; beyond it the server answers 503 with retry-after.")
    drain_timeout: float = option(30.0, "Seconds that running requests get to finish after SIGTERM.")
    compat_metrics: bool = option(True, "Also export the vllm:* names that gateways and autoscalers read.")
    log_level: str = option("info", "Log level.", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the option, its value and the remedy.
        """
        _check_types(self)
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}; it must be in 0..65535.")
        if self.api_key is not None and (not self.api_key or self.api_key != self.api_key.strip()):
            raise ConfigError(
                "--api-key (or DOVETAIL_API_KEY) is empty or has white space at its ends, and no client could send it. "
                "Set a key, or leave it out."
            )
        if not 0 < self.max_body_mb < math.inf:
            raise ConfigError(f"--max-body-mb is {self.max_body_mb}; it must be a positive number of MB.")
        if self.max_waiting < 0:
            raise ConfigError(f"--max-waiting is {self.max_waiting}; it must not be negative.")
        if not 0 <= self.drain_timeout < math.inf:
            raise ConfigError(f"--drain-timeout is {self.drain_timeout}; it must be a number of seconds, 0 or more.")
        _check_choices(self)


KIND_WORDS: Mapping[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    dict: "a mapping",
}
"""How messages name the kinds of :func:`kinds`."""


@lru_cache
def kinds(cls: type) -> dict[str, type]:
    """The plain type of each field: int, float, bool, str, or dict for a mapping; ``| None`` is dropped."""
    return {name: _kind(hint) for name, hint in get_type_hints(cls).items()}


def _kind(hint: Any) -> type:
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (part for part in get_args(hint) if part is not NoneType)
    if get_origin(hint) is not None:
        hint = get_origin(hint)
    return dict if isinstance(hint, type) and issubclass(hint, Mapping) else hint


def is_kind(value: object, kind: type) -> bool:
    """Whether a value may stand for an option of this kind; a whole number is also a number, a bool is neither."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    wanted: Any = {float: (int, float), dict: Mapping}.get(kind, kind)
    return isinstance(value, wanted)


def _check_types(options: EngineOptions | ServerOptions) -> None:
    cls: type = type(options)
    for f in fields(options):
        value, kind = getattr(options, f.name), kinds(cls)[f.name]
        if not (is_kind(value, kind) or (value is None and f.default is None)):
            raise ConfigError(f"{flag(f.name)} is {value!r} ({type(value).__name__}); it must be {KIND_WORDS[kind]}.")


def _check_choices(options: EngineOptions | ServerOptions) -> None:
    for f in fields(options):
        choices, value = f.metadata["choices"], getattr(options, f.name)
        if choices and value not in choices:
            raise ConfigError(f"{flag(f.name)} is {value!r}; choose one of {', '.join(choices)}.")


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def as_words(name: str, value: Any) -> list[str]:
    """The words of a command line that give one option; for the model, the argument itself."""
    if name == "model":
        return [str(value)]
    if isinstance(value, bool):
        return [flag(name) if value else f"--no-{flag(name)[2:]}"]
    return [flag(name), json.dumps(value) if isinstance(value, Mapping) else str(value)]


def asked(options: EngineOptions | ServerOptions) -> dict[str, Any]:
    """The options that differ from their defaults."""
    values = {f.name: getattr(options, f.name) for f in fields(options)}
    return {f.name: values[f.name] for f in fields(options) if values[f.name] != f.default}


def arguments(options: EngineOptions) -> list[str]:
    """The command line that gives these options, defaults left out."""
    return [word for name, value in asked(options).items() for word in as_words(name, value)]


def parse(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build an options object from a mapping; dashes and underscores are the same.

    Raises:
        ConfigError: an unknown key, with the nearest known one.
    """
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    named = {key.replace("-", "_"): value for key, value in values.items()}
    for key in named:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"Unknown option {key!r}.{hint} Known: {', '.join(known)}.")
    return cls(**named)
