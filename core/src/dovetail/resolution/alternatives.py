"""What could be asked for instead: per option, other values that someone declares, the likeliest first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import SequenceMatcher
from itertools import islice
from typing import TYPE_CHECKING, Any

from dovetail.options import EngineOptions
from dovetail.plugins.manifest import SpecDecoderManifest
from dovetail.plugins.registry import Registries, Registry

if TYPE_CHECKING:
    from dovetail.contracts.model import ModelFacts


def values(name: str, options: EngineOptions, registries: Registries, facts: ModelFacts | None) -> list[Any]:
    """Other values of one option than the one that ``options`` has; the likeliest, if there are very many."""
    current = getattr(options, name)
    others = _unique(value for value in OPTIONS[name](options, registries, facts) if value != current)
    return list(islice(others, MOST))


def _attention(options: EngineOptions, registries: Registries, facts: ModelFacts | None) -> Iterable[str]:
    listed = [name for chip in registries.platforms.ranked() for name in chip.manifest.attention]
    names = [*listed, *(entry.name for entry in registries.attention.ranked())]
    return _alike(options.attention, [name for name in names if name in registries.attention])


def _block_sizes(options: EngineOptions, registries: Registries, facts: ModelFacts | None) -> Iterable[int]:
    """Of each backend, the size that is nearest to the one asked for."""
    sizes = [entry.manifest.block_sizes for entry in registries.attention if entry.manifest.block_sizes]
    return sorted(min(some, key=lambda size: abs(size - options.block_size)) for some in sizes)


def _kv_dtypes(options: EngineOptions, registries: Registries, facts: ModelFacts | None) -> Iterable[str]:
    return ["auto", *(dtype for entry in registries.attention.ranked() for dtype in entry.manifest.kv_dtypes)]


def _dtypes(options: EngineOptions, registries: Registries, facts: ModelFacts | None) -> Iterable[str]:
    return ["auto", *(dtype for entry in registries.platforms.ranked() for dtype in entry.manifest.dtypes)]


def _lengths(options: EngineOptions, registries: Registries, facts: ModelFacts | None) -> Iterable[int]:
    """Declared limits below what is asked for, the longest first."""
    parts = (*registries.platforms, *registries.attention)
    limits = {entry.manifest.max_context for entry in parts} | {options.max_num_batched_tokens}
    limits.add(None if facts is None else facts.max_positions)
    asked = options.max_model_len
    return sorted((n for n in limits if n is not None and (asked is None or n < asked)), reverse=True)


def _steps(options: EngineOptions, registries: Registries, facts: ModelFacts | None) -> Iterable[int]:
    """A step that holds the longest prompt."""
    length = options.max_model_len or (None if facts is None else facts.max_positions)
    return [] if length is None else [max(length, options.max_num_seqs)]


def _platform_sections(
    options: EngineOptions, registries: Registries, facts: ModelFacts | None
) -> Iterator[Mapping[str, Any] | None]:
    """What some platform would understand of the section; and none at all."""
    given = options.platform_config or {}
    for entry in registries.platforms.ranked():
        understood = {key: value for key, value in given.items() if key in entry.manifest.defaults}
        if understood:
            yield understood
    yield None


def _sections(
    options: EngineOptions, registries: Registries, facts: ModelFacts | None
) -> Iterator[Mapping[str, Any] | None]:
    """The section as each speculator would understand it, that of the likeliest name first; and none at all."""
    given = options.speculative_config
    if given is None:
        return
    for name in _alike(str(given.get("method")), registries.spec_decoders.names()):
        manifest = registries.spec_decoders.entries[name].manifest
        yield {"method": name, **_understood(given, manifest, options.max_num_batched_tokens)}
    yield None


def _understood(given: Mapping[str, Any], manifest: SpecDecoderManifest, most: int) -> dict[str, Any]:
    """What a speculator can read of a section. Of drafts there are at most ``most``."""
    known = {*manifest.defaults, "num_speculative_tokens"} | ({"model"} if manifest.needs_draft_model else set())
    kept = {key: value for key, value in given.items() if key in known}
    drafts = kept.get("num_speculative_tokens")
    if isinstance(drafts, bool) or not isinstance(drafts, int) or not 1 <= drafts <= most:
        kept.pop("num_speculative_tokens", None)
        if "num_speculative_tokens" not in manifest.defaults:
            kept["num_speculative_tokens"] = 1
    return kept


def _quantizations(
    options: EngineOptions, registries: Registries, facts: ModelFacts | None
) -> Iterator[str | None]:
    """A method of a similar name; what the checkpoint says; any other method."""
    if options.quantization is None:
        return
    names = _alike(options.quantization, registries.quant.names())
    similar = [name for name in names if _likeness(name, options.quantization) >= _SIMILAR]
    yield from (*similar, None, *names)


def _platforms(options: EngineOptions, registries: Registries, facts: ModelFacts | None) -> Iterable[str]:
    return _alike(options.platform, _ranked(registries.platforms))


def _unhurried(options: EngineOptions, registries: Registries, facts: ModelFacts | None) -> Iterable[bool | None]:
    return [None]


def _chunked(options: EngineOptions, registries: Registries, facts: ModelFacts | None) -> Iterable[bool]:
    return [True]


MOST = 30
"""Values of one option that are looked at. Combinations of them are tried, so that thousands would never end."""
_SIMILAR = 0.6
"""Likeness from which on one name may be meant by the other; as for the hints of messages."""

OPTIONS: Mapping[str, Callable[[EngineOptions, Registries, ModelFacts | None], Iterable[Any]]] = {
    "block_size": _block_sizes,
    "attention": _attention,
    "async_scheduling": _unhurried,
    "enable_chunked_prefill": _chunked,
    "max_num_batched_tokens": _steps,
    "kv_cache_dtype": _kv_dtypes,
    "dtype": _dtypes,
    "max_model_len": _lengths,
    "platform_config": _platform_sections,
    "speculative_config": _sections,
    "quantization": _quantizations,
    "platform": _platforms,
}
"""The options that may change, those first whose change matters least to what is computed."""


def _ranked(registry: Registry[Any]) -> list[str]:
    return [entry.name for entry in registry.ranked()]


def _alike(wanted: str, names: Iterable[str]) -> list[str]:
    """Names that may be meant by ``wanted`` first, the most alike in front; the rest in the order given."""
    return sorted(names, key=lambda name: -likeness if (likeness := _likeness(name, wanted)) >= _SIMILAR else 0)


def _likeness(name: str, wanted: str) -> float:
    return SequenceMatcher(None, name, wanted).ratio()


def _unique(values: Iterable[Any]) -> Iterator[Any]:
    seen: list[Any] = []
    for value in values:
        if value not in seen:
            seen.append(value)
            yield value
