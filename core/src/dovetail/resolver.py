"""The resolver: what the user asks for × what is installed × what machine and model are → one configuration.

Every part has candidates in a declared order; each is taken, or rejected with its reasons. All obstacles are
collected before anything is refused, so that one look shows everything that has to change. ``auto`` picks by
declared order and priority alone, and every decision can be explained.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from dovetail import checkpoint
from dovetail.config import EngineConfig
from dovetail.errors import DovetailError, PluginLoadError, ResolutionError
from dovetail.options import EngineOptions
from dovetail.plugins.manifest import PlatformManifest
from dovetail.plugins.registry import Registries
from dovetail.resolution import attention, model, platform, quantization, speculation
from dovetail.resolution.decision import Decision, Part, either

if TYPE_CHECKING:
    from dovetail.contracts.model import ModelFacts

GIB = 2**30
_AS_GIVEN = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "scheduling_policy",
    "seed",
    "num_threads",
)
"""Options that the configuration takes over unchanged."""

_logger = logging.getLogger("dovetail.resolver")


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """How the resolver decided.

    Attributes:
        model_name, model_path: of the checkpoint.
        parts: every part, in the order of decision.
        reasons: every obstacle; empty if and only if there is a configuration.
        config: the configuration, or None.
    """

    model_name: str
    model_path: str
    parts: tuple[Part, ...]
    reasons: tuple[str, ...]
    config: EngineConfig | None


def resolve(options: EngineOptions, registries: Registries) -> EngineConfig:
    """Decide what runs.

    Imports the chosen classes, and so torch.

    Raises:
        PluginLoadError: a plugin that ``DOVETAIL_PLUGINS`` names is broken.
        ConfigError: the checkpoint cannot be found or read.
        ResolutionError: the request cannot be honoured; holds every reason.
    """
    broken = _broken_plugins(registries)
    if broken:
        raise PluginLoadError("\n".join(["Cannot start without plugins that were asked for:", *broken]))
    explanation = explain(options, registries)
    if explanation.config is None:
        raise ResolutionError(f"Cannot run {explanation.model_name} as asked:", explanation.reasons)
    return explanation.config


def explain(options: EngineOptions, registries: Registries) -> Explanation:
    """Decide like :func:`resolve`, but tell how instead of refusing.

    Raises:
        ConfigError: the checkpoint cannot be found or read.
    """
    path, name = checkpoint.select(options, registries)
    hf_config = checkpoint.read_config(path)
    eos = checkpoint.eos_token_ids(path, hf_config)

    chip = platform.decide(options, registries)
    family, facts = model.decide(hf_config, registries, chip.entry)
    dtype, dtype_obstacles = _dtype(options, chip, facts)
    speculator, num_drafts, spec_options = speculation.decide(options, registries)
    backend = attention.decide(options, registries, chip.entry, facts, dtype)
    weights = quantization.decide(options, registries, hf_config, dtype)
    max_model_len, length_obstacles = _max_model_len(options, facts)

    decisions: tuple[Decision[Any], ...] = (chip, family, backend, weights, speculator)
    _warn_of_broken_candidates(decisions)
    reasons = _broken_plugins(registries)
    reasons += [reason for decision in decisions for reason in decision.obstacles]
    reasons += [*dtype_obstacles, *length_obstacles]
    config = None
    if not reasons:
        assert facts is not None, "no reasons, so every part is decided"
        assert dtype is not None
        config = EngineConfig(
            model_path=str(path),
            model_name=name,
            hf_config=hf_config,
            model=family.selection(),
            platform=chip.selection(),
            attention=backend.selection(),
            quant=weights.selection(),
            spec_decoder=None if speculator.entry is None else speculator.selection(),
            dtype=dtype,
            kv_dtype=dtype if options.kv_cache_dtype == "auto" else options.kv_cache_dtype,
            vocab_size=facts.vocab_size,
            eos_token_ids=eos,
            max_model_len=max_model_len,
            kv_cache_memory=None if options.kv_cache_memory is None else int(options.kv_cache_memory * GIB),
            num_speculative_tokens=num_drafts,
            spec_options=spec_options,
            **{name: getattr(options, name) for name in _AS_GIVEN},
        )
    return Explanation(
        model_name=name,
        model_path=str(path),
        parts=tuple(decision.explained() for decision in decisions),
        reasons=tuple(reasons),
        config=config,
    )


def _warn_of_broken_candidates(decisions: Iterable[Decision[Any]]) -> None:
    """A candidate that should have been better and cannot even be imported is worth a line."""
    for decision in decisions:
        for line in decision.broken if decision.entry is not None else ():
            _logger.warning("%s It is passed over.", line)


def _broken_plugins(registries: Registries) -> list[str]:
    """Plugins that ``DOVETAIL_PLUGINS`` names and that failed."""
    return [
        f"DOVETAIL_PLUGINS names {plugin.owner}, which failed: {plugin.error} Repair it (`dovetail plugins` "
        "shows the details), or take it off the list."
        for plugin in registries.plugins
        if plugin.asked and plugin.state == "failed"
    ]


def _dtype(
    options: EngineOptions, chip: Decision[PlatformManifest], facts: ModelFacts | None
) -> tuple[str | None, list[str]]:
    """The activation dtype's name, and obstacles. ``auto`` asks the platform, given the checkpoint's."""
    if chip.entry is None:
        return (None if options.dtype == "auto" else options.dtype), []
    supported = chip.entry.manifest.dtypes
    owner = f"platform {chip.entry.name!r}"
    if options.dtype != "auto":
        if options.dtype in supported:
            return options.dtype, []
        return options.dtype, [
            f"{owner} does not compute in --dtype {options.dtype}; choose {either(['auto', *supported])}."
        ]
    if facts is None:
        return None, []
    try:
        dtype = str(chip.loaded.default_dtype(facts.dtype)).removeprefix("torch.")
    except DovetailError as error:
        return None, [str(error)]
    except Exception as error:  # noqa: BLE001  the plugin's failure, and the reason to refuse
        return None, [f"{owner} names no default dtype: {type(error).__name__}: {error}; set --dtype."]
    if dtype not in supported:
        return None, [
            f"{owner} answers --dtype auto with {dtype}, which its own manifest does not list; "
            f"choose --dtype {either(supported)}, and report this to {chip.entry.distribution}."
        ]
    return dtype, []


def _max_model_len(options: EngineOptions, facts: ModelFacts | None) -> tuple[int, list[str]]:
    """The longest context served, and obstacles."""
    if facts is None:
        return 0, []
    length = facts.max_positions if options.max_model_len is None else options.max_model_len
    obstacles = []
    if length > facts.max_positions:
        obstacles.append(
            f"--max-model-len {length} exceeds the {facts.max_positions} positions that the checkpoint was "
            f"made for; choose at most {facts.max_positions}."
        )
    if not options.enable_chunked_prefill and options.max_num_batched_tokens < length:
        obstacles.append(
            f"Without chunked prefill a prompt of up to {length} tokens must fit into one step, and "
            f"--max-num-batched-tokens is {options.max_num_batched_tokens}; raise it, lower --max-model-len, "
            "or leave out --no-enable-chunked-prefill."
        )
    return length, obstacles
