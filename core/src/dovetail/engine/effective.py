"""The effective configuration, for people: what runs, who brings it, and what was set by an option. Torch-free."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import NamedTuple

from dovetail.config import EngineConfig, Selection
from dovetail.contracts.executor import ExecutorInfo
from dovetail.sizes import size

MARK = "*"
"""Stands before what an option changed."""


class Row(NamedTuple):
    """One line.

    Attributes:
        changed: whether an option set it to something else than the default.
    """

    title: str
    text: str
    changed: bool = False


def rows(config: EngineConfig, info: ExecutorInfo, asked: Container[str]) -> Iterator[Row]:
    """Every part, then every setting, then what was changed to make it run.

    Args:
        asked: names of the options that differ from their defaults.
    """

    def row(title: str, text: str, *options: str) -> Row:
        return Row(title, text, any(option in asked for option in options))

    filled = ", random weights" if config.load_format == "dummy" else ""
    yield row("model", _part(config.model) + filled, "model", "revision", "load_format")
    own = (f"{name} {value}" for name, value in config.platform_options.items())
    chip = ", ".join((_part(config.platform), *(("eager",) if config.eager else ()), *own))
    yield row("platform", chip, "platform", "platform_config", "eager")
    if config.compile_cache is not None:
        yield row("compiled code", f"kept in {config.compile_cache}", "compile_cache")
    yield row("attention", _part(config.attention), "attention")
    yield row("quantization", _part(config.quant), "quantization")
    yield row("speculation", _speculation(config), "speculative_config")
    if config.draft is not None:
        yield row("draft model", f"{config.draft.model_name}: {_part(config.draft.model)}", "speculative_config")
    yield row("dtype", f"{config.dtype}, KV cache {config.kv_dtype}", "dtype", "kv_cache_dtype")
    cache = ("kv_cache_memory", "memory_fraction", "block_size", "enable_prefix_caching")
    yield row("KV cache", _cache(config, info), *cache)
    limits = ("max_model_len", "max_num_seqs", "max_num_batched_tokens")
    yield row("limits", _limits(config), *limits)
    prefill = "chunked" if config.enable_chunked_prefill else "whole prompts"
    ahead = "asynchronous" if config.async_scheduling else "synchronous"
    order = ("enable_chunked_prefill", "async_scheduling", "scheduling_policy", "seed")
    yield row("scheduling", f"{config.scheduling_policy}, {prefill}, {ahead}, seed {config.seed}", *order)
    if config.num_threads is not None:
        yield row("threads", str(config.num_threads), "num_threads")
    for change in config.fallbacks:
        yield Row("fallback", f"{change.option} {change.asked} → {change.got}", True)


def lines(rows: list[Row]) -> list[str]:
    """The rows as an aligned block, what an option changed marked."""
    width = max(len(row.title) for row in rows)
    block = [f"{MARK if row.changed else ' '} {row.title:{width}}  {row.text}" for row in rows]
    return [*block, f"{MARK} set by an option"] if any(row.changed for row in rows) else block


def _part(part: Selection) -> str:
    source = f"{part.distribution} {part.version}"
    return f"{part.name} ({f'{part.plugin}, ' if part.plugin else ''}{source}; {part.why})"


def _speculation(config: EngineConfig) -> str:
    if config.spec_decoder is None:
        return "none"
    return f"{_part(config.spec_decoder)}, up to {config.num_speculative_tokens} drafts per step"


def _cache(config: EngineConfig, info: ExecutorInfo) -> str:
    usable = info.num_blocks - 1  # one block stands for "none"
    prefix = "on" if config.enable_prefix_caching else "off"
    draft = f", {size(info.draft_bytes)} of them the draft model's" if info.draft_bytes else ""
    return (
        f"{usable * info.block_size} tokens in {usable} blocks of {info.block_size}, "
        f"{size(info.num_blocks * info.page_bytes + info.draft_bytes)}{draft}; prefix cache {prefix}"
    )


def _limits(config: EngineConfig) -> str:
    return (
        f"{config.max_model_len} tokens per request, {config.max_num_seqs} requests and "
        f"{config.max_num_batched_tokens} tokens per step"
    )
