"""The resolver: what the user asks for × what is installed × what machine and model are → one configuration.

Every part has candidates in a declared order; each is taken, or rejected with its reasons. All obstacles are
collected before anything is refused, so that one look shows everything that has to change. ``auto`` picks by
declared order and priority alone, and every decision can be explained.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from dovetail import checkpoint
from dovetail.config import EngineConfig, Selection
from dovetail.errors import DovetailError, PluginLoadError, ResolutionError, UnknownNameError
from dovetail.options import EngineOptions
from dovetail.plugins.manifest import (
    AttentionManifest,
    Manifest,
    ModelManifest,
    PlatformManifest,
    QuantManifest,
    SpecDecoderManifest,
)
from dovetail.plugins.registry import Entry, Registries, Registry, nearest

if TYPE_CHECKING:
    from dovetail.contracts.model import ModelFacts

M = TypeVar("M", bound=Manifest)
GIB = 2**30
PLAIN = "none"
"""The quantization method of plain weights."""

_logger = logging.getLogger("dovetail.resolver")


class Rejected(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate that was not taken, and why."""

    name: str
    plugin: str
    distribution: str
    reasons: tuple[str, ...]


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One part of the configuration.

    Attributes:
        part: ``"platform"``, ``"model"``, ``"attention"``, ``"quantization"`` or ``"speculation"``.
        chosen: what was taken, or None.
        plugin: the plugin that brings it.
        rejected: the other candidates.
    """

    part: str
    chosen: Selection | None
    plugin: str | None
    rejected: tuple[Rejected, ...]


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


@dataclass(kw_only=True, slots=True)
class Decision(Generic[M]):
    """One part while it is decided.

    Attributes:
        entry: the candidate taken, with its class and why.
        rejected: candidates and their reasons.
        broken: the rejected ones that could not even be imported.
        obstacles: why the whole request cannot be honoured.
    """

    part: str
    entry: Entry[M] | None = None
    loaded: Any = None
    why: str = ""
    rejected: list[tuple[Entry[M], tuple[str, ...]]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)

    def take(self, entry: Entry[M], loaded: Any, why: str) -> None:
        """Decide."""
        self.entry, self.loaded, self.why = entry, loaded, why

    def reject(self, entry: Entry[M], *reasons: str) -> None:
        """Note why a candidate was not taken."""
        self.rejected.append((entry, reasons))

    def refuse_rejected(self, headline: str) -> None:
        """Nobody was taken: turn every candidate's reasons into obstacles."""
        for entry, reasons in self.rejected:
            self.obstacles.extend(
                f"{headline} {entry.name!r} of {entry.distribution}: {reason}" for reason in reasons
            )

    def selection(self) -> Selection:
        """The decision in the configuration's terms; only once it is taken."""
        assert self.entry is not None
        return Selection(
            name=self.entry.name,
            target=self.entry.target,
            distribution=self.entry.distribution,
            version=self.entry.version,
            why=self.why,
        )

    def explained(self) -> Part:
        """The decision in the explanation's terms."""
        return Part(
            part=self.part,
            chosen=None if self.entry is None else self.selection(),
            plugin=None if self.entry is None else self.entry.plugin,
            rejected=tuple(
                Rejected(
                    name=entry.name, plugin=entry.plugin, distribution=entry.distribution, reasons=reasons
                )
                for entry, reasons in self.rejected
            ),
        )


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

    platform = _platform(options, registries)
    model, facts = _model(hf_config, registries, platform.entry)
    dtype, dtype_obstacles = _dtype(options, platform, facts)
    speculation, num_drafts, spec_options = _speculation(options, registries)
    attention = _attention(options, registries, platform.entry, facts, dtype)
    quant = _quantization(options, registries, hf_config, dtype)
    max_model_len, length_obstacles = _max_model_len(options, facts)

    decisions: tuple[Decision[Any], ...] = (platform, model, attention, quant, speculation)
    for decision in decisions:
        for line in decision.broken if decision.entry is not None else ():
            _logger.warning("%s It is passed over.", line)
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
            model=model.selection(),
            platform=platform.selection(),
            attention=attention.selection(),
            quant=quant.selection(),
            spec_decoder=None if speculation.entry is None else speculation.selection(),
            dtype=dtype,
            kv_dtype=_kv_dtype(options, dtype),
            vocab_size=facts.vocab_size,
            eos_token_ids=eos,
            max_model_len=max_model_len,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            block_size=options.block_size,
            kv_cache_memory=None if options.kv_cache_memory is None else int(options.kv_cache_memory * GIB),
            enable_prefix_caching=options.enable_prefix_caching,
            enable_chunked_prefill=options.enable_chunked_prefill,
            scheduling_policy=options.scheduling_policy,
            seed=options.seed,
            num_threads=options.num_threads,
            num_speculative_tokens=num_drafts,
            spec_options=spec_options,
        )
    return Explanation(
        model_name=name,
        model_path=str(path),
        parts=tuple(decision.explained() for decision in decisions),
        reasons=tuple(reasons),
        config=config,
    )


def _broken_plugins(registries: Registries) -> list[str]:
    """Plugins that ``DOVETAIL_PLUGINS`` names and that failed."""
    return [
        f"DOVETAIL_PLUGINS names {plugin.owner}, which failed: {plugin.error} Repair it (`dovetail plugins` "
        "shows the details), or take it off the list."
        for plugin in registries.plugins
        if plugin.asked and plugin.state == "failed"
    ]


def _platform(options: EngineOptions, registries: Registries) -> Decision[PlatformManifest]:
    """The named platform if this machine has it, or else the available one of highest priority."""
    decision: Decision[PlatformManifest] = Decision(part="platform")
    auto = options.platform == "auto"
    candidates = (
        registries.platforms.ranked() if auto else _named(registries.platforms, options.platform, decision)
    )
    for entry in candidates:
        if decision.entry is not None:
            decision.reject(entry, f"{decision.entry.name!r} comes first")
            continue
        cls = _load(entry, "dovetail.contracts.platform:Platform", decision)
        if cls is None:
            continue
        probe = _probe(cls)
        if probe:
            decision.reject(entry, f"not available here: {probe}")
        else:
            decision.take(
                entry, cls, "available here, highest priority" if auto else "asked for with --platform"
            )
    if decision.entry is None:
        if auto and not candidates:
            decision.obstacles.append("No platform is registered; reinstall dovetail-core, which brings one.")
        decision.refuse_rejected("platform")
        if not auto and decision.rejected:
            decision.obstacles[-1] += " Repair that, or leave out --platform to use what is available."
    return decision


def _probe(cls: Any) -> str:
    """Why the platform is not available; empty if it is."""
    try:
        probe = cls.probe()
    except Exception as error:  # noqa: BLE001  a probe that raises is a platform that cannot be used
        return f"its probe raised {type(error).__name__}: {error}"
    return "" if probe.available else probe.reason or "its probe gave no reason"


def _model(
    hf_config: Mapping[str, Any], registries: Registries, platform: Entry[PlatformManifest] | None
) -> tuple[Decision[ModelManifest], ModelFacts | None]:
    """The family that serves the checkpoint's architecture; a platform's own version goes by priority."""
    decision: Decision[ModelManifest] = Decision(part="model")
    facts = None
    architectures = hf_config.get("architectures") or []
    if not architectures:
        decision.obstacles.append("config.json names no architectures; add the model class's name to it.")
        return decision, None
    serving = [entry for entry in registries.models if set(entry.manifest.architectures) & set(architectures)]
    if not serving:
        decision.obstacles.append(_unknown_architecture(architectures, registries.models))
        return decision, None
    serving.sort(key=lambda entry: (-entry.manifest.priority, entry.manifest.platform is None, entry.name))
    for entry in serving:
        wanted = entry.manifest.platform
        if wanted is not None and (platform is None or wanted != platform.name):
            decision.reject(entry, f"made for platform {wanted!r} alone")
            continue
        if decision.entry is not None:
            decision.reject(entry, f"{decision.entry.name!r} comes first")
            continue
        cls = _load(entry, "dovetail.contracts.model:Model", decision)
        if cls is None:
            continue
        try:
            facts = cls.facts(hf_config)
        except DovetailError as error:
            decision.reject(entry, str(error))
        except Exception as error:  # noqa: BLE001  the family cannot read this config
            decision.reject(entry, f"cannot read config.json: {type(error).__name__}: {error}")
        else:
            decision.take(entry, cls, f"serves {', '.join(architectures)}")
    if decision.entry is None:
        decision.refuse_rejected("model family")
    return decision, facts


def _unknown_architecture(architectures: Sequence[str], models: Registry[ModelManifest]) -> str:
    known = sorted({architecture for entry in models for architecture in entry.manifest.architectures})
    return " ".join(
        [
            f"No installed plugin serves the architecture {', '.join(architectures)}."
            f"{nearest(architectures[0], known)}",
            f"Served: {', '.join(known) or 'none'}. Install the distribution that brings it;",
            "`dovetail plugins` lists what is installed.",
            *models.hints,
        ]
    )


def _dtype(
    options: EngineOptions, platform: Decision[PlatformManifest], facts: ModelFacts | None
) -> tuple[str | None, list[str]]:
    """The activation dtype's name, and obstacles. ``auto`` asks the platform, given the checkpoint's."""
    if platform.entry is None:
        return (None if options.dtype == "auto" else options.dtype), []
    supported = platform.entry.manifest.dtypes
    owner = f"platform {platform.entry.name!r}"
    if options.dtype != "auto":
        if options.dtype in supported:
            return options.dtype, []
        return options.dtype, [
            f"{owner} does not compute in --dtype {options.dtype}; choose {_either(['auto', *supported])}."
        ]
    if facts is None:
        return None, []
    from dovetail.contracts.platform import PlatformConfig

    try:
        chip = platform.loaded(PlatformConfig(num_threads=options.num_threads))
        dtype = str(chip.default_dtype(facts.dtype)).removeprefix("torch.")
    except DovetailError as error:
        return None, [str(error)]
    except Exception as error:  # noqa: BLE001  the plugin's failure, and the reason to refuse
        return None, [f"{owner} failed to start: {type(error).__name__}: {error}; choose another --platform."]
    if dtype not in supported:
        return None, [
            f"{owner} answers --dtype auto with {dtype}, which its own manifest does not list; "
            f"choose --dtype {_either(supported)}, and report this to {platform.entry.distribution}."
        ]
    return dtype, []


def _kv_dtype(options: EngineOptions, dtype: str) -> str:
    return dtype if options.kv_cache_dtype == "auto" else options.kv_cache_dtype


def _attention(
    options: EngineOptions,
    registries: Registries,
    platform: Entry[PlatformManifest] | None,
    facts: ModelFacts | None,
    dtype: str | None,
) -> Decision[AttentionManifest]:
    """The named backend if it can do what the model needs, or else the platform's first that can."""
    decision: Decision[AttentionManifest] = Decision(part="attention")
    auto = options.attention == "auto"
    if auto:
        listed = () if platform is None else platform.manifest.attention
        candidates = [registries.attention.entries[name] for name in listed if name in registries.attention]
    else:
        listed = ()
        candidates = list(_named(registries.attention, options.attention, decision))
    for entry in candidates:
        if decision.entry is not None:
            decision.reject(entry, f"{decision.entry.name!r} comes first")
            continue
        reasons = tuple(_attention_gaps(entry.manifest, options, platform, facts, dtype))
        if reasons:
            decision.reject(entry, *reasons)
            continue
        cls = _load(entry, "dovetail.contracts.attention:AttentionBackend", decision)
        if cls is not None:
            why = "the platform's first that supports the model" if auto else "asked for with --attention"
            decision.take(entry, cls, why)
    if decision.entry is None:
        decision.refuse_rejected("attention backend")
        if platform is not None and auto and not candidates:
            decision.obstacles.append(
                f"platform {platform.name!r} lists attention backends {', '.join(listed) or 'none'}, but "
                "none of them is registered; name one with --attention. "
                f"Registered: {', '.join(registries.attention.names()) or 'none'}."
            )
    if auto and platform is not None:
        for entry in registries.attention.ranked():
            if entry not in candidates:
                decision.reject(entry, "not among the platform's backends; ask for it with --attention")
    return decision


def _attention_gaps(
    manifest: AttentionManifest,
    options: EngineOptions,
    platform: Entry[PlatformManifest] | None,
    facts: ModelFacts | None,
    dtype: str | None,
) -> Iterable[str]:
    """What is asked for and the backend cannot do, each with what to change."""
    other = "choose another --attention"
    if platform is not None and platform.manifest.device_type not in manifest.device_types:
        yield (
            f"runs on {', '.join(manifest.device_types)}, not on {platform.manifest.device_type} of platform "
            f"{platform.name!r}; {other}."
        )
    if dtype is not None and dtype not in manifest.dtypes:
        yield f"does not accept {dtype}; choose --dtype {_either(manifest.dtypes)}, or {other}."
    kv_dtype = options.kv_cache_dtype
    if kv_dtype not in manifest.kv_dtypes and not (kv_dtype == dtype and "auto" in manifest.kv_dtypes):
        choices = _either(manifest.kv_dtypes)
        yield f"cannot store the KV cache as {kv_dtype}; choose --kv-cache-dtype {choices}, or {other}."
    if manifest.block_sizes and options.block_size not in manifest.block_sizes:
        choices = _either(manifest.block_sizes)
        yield f"has no {options.block_size}-token blocks; choose --block-size {choices}, or {other}."
    if options.speculative_config is not None and not manifest.verify:
        yield f"cannot verify drafts; leave out --speculative-config, or {other}."
    if facts is None:
        return
    sizes = sorted({spec.head_size for spec in facts.attention})
    unsupported = [size for size in sizes if manifest.head_sizes and size not in manifest.head_sizes]
    if unsupported:
        yield (
            f"has no head size {', '.join(map(str, unsupported))}, which the model needs "
            f"(it has {', '.join(map(str, manifest.head_sizes))}); {other}."
        )
    needs = set(facts.needs)
    if any(spec.window is not None for spec in facts.attention):
        needs.add("sliding_window")
    if any(spec.soft_cap is not None for spec in facts.attention):
        needs.add("soft_cap")
    for need in sorted(needs):
        if getattr(manifest, need, False) is not True:
            yield f"lacks {need}, which the model needs; {other}."


def _quantization(
    options: EngineOptions, registries: Registries, hf_config: Mapping[str, Any], dtype: str | None
) -> Decision[QuantManifest]:
    """The method that reads the checkpoint's weights, or quantizes plain ones on load."""
    decision: Decision[QuantManifest] = Decision(part="quantization")
    section = hf_config.get("quantization_config")
    method = section.get("quant_method") if isinstance(section, Mapping) else section
    if options.quantization is not None:
        why = "asked for with --quantization"
        candidates = _named(registries.quant, options.quantization, decision)
    elif section is None:
        why = "the checkpoint's weights are plain"
        candidates = _named(registries.quant, PLAIN, decision)
    else:
        why = "recognises the checkpoint's quantization_config"
        candidates = [e for e in registries.quant.ranked() if method in e.manifest.checkpoint_methods]
        if not candidates:
            hints = " ".join(registries.quant.hints)
            decision.obstacles.append(
                f"The checkpoint is quantized with {method!r}, which no installed plugin can read. "
                f"Install the distribution that brings it, or use an unquantized checkpoint. {hints}".rstrip()
            )
    for entry in candidates:
        if decision.entry is not None:
            decision.reject(entry, f"{decision.entry.name!r} comes first")
            continue
        gap = _quant_gap(entry.manifest, section, method, dtype)
        if gap:
            decision.reject(entry, gap)
            continue
        cls = _load(entry, "dovetail.contracts.quant:QuantMethod", decision)
        if cls is None:
            continue
        if section is not None and not cls.recognises(section):
            decision.reject(entry, f"does not recognise the checkpoint's {_brief(section)}.")
        else:
            decision.take(entry, cls, why)
    if decision.entry is None:
        decision.refuse_rejected("quantization method")
    return decision


def _quant_gap(manifest: QuantManifest, section: Any, method: Any, dtype: str | None) -> str:
    """Why a method does not fit, judged by its manifest; empty if it may."""
    if section is None and manifest.name != PLAIN and not manifest.on_load:
        return (
            "cannot quantize while loading, and this checkpoint is unquantized; leave out --quantization, or "
            "name a checkpoint in this format."
        )
    if section is not None and method not in manifest.checkpoint_methods:
        return f"cannot read this checkpoint, which is quantized with {method!r}; leave out --quantization."
    if dtype is not None and manifest.dtypes and dtype not in manifest.dtypes:
        return f"does not work with activations in {dtype}; choose --dtype {_either(manifest.dtypes)}."
    from dovetail.contracts.ops import OpTable

    unknown = sorted(manifest.ops - OpTable.names())
    if unknown:
        return f"needs operations that this core lacks: {', '.join(unknown)}; install matching releases."
    return ""


def _speculation(
    options: EngineOptions, registries: Registries
) -> tuple[Decision[SpecDecoderManifest], int, dict[str, Any]]:
    """The speculator, its number of drafts, and its own section."""
    decision: Decision[SpecDecoderManifest] = Decision(part="speculation")
    given = options.speculative_config
    if given is None:
        return decision, 0, {}
    method = given.get("method")
    if not isinstance(method, str):
        known = ", ".join(registries.spec_decoders.names()) or "none"
        decision.obstacles.append(
            f"--speculative-config has method {method!r}; name a registered one (registered: {known})."
        )
        return decision, 0, {}
    for entry in _named(registries.spec_decoders, method, decision):
        cls = _load(entry, "dovetail.contracts.specdec:SpecDecoder", decision)
        if cls is not None:
            decision.take(entry, cls, "asked for with --speculative-config")
        section = {**entry.manifest.defaults, **{key: given[key] for key in given if key != "method"}}
        drafts = section.pop("num_speculative_tokens", None)
        decision.obstacles += _speculation_gaps(entry.manifest, section, drafts)
        if cls is not None and not decision.obstacles:
            return decision, drafts, section
    decision.refuse_rejected("speculative method")
    return decision, 0, {}


def _speculation_gaps(
    manifest: SpecDecoderManifest, section: Mapping[str, Any], drafts: Any
) -> Iterable[str]:
    option = "--speculative-config"
    if not isinstance(drafts, int) or isinstance(drafts, bool) or drafts < 1:
        yield f"{option} has num_speculative_tokens {drafts!r}; give a whole number of at least 1."
    known = [key for key in manifest.defaults if key != "num_speculative_tokens"]
    if manifest.needs_draft_model:
        known.append("model")
        if not section.get("model"):
            yield f'{option}: method {manifest.name!r} needs a draft model; add "model": PATH_OR_HUB_ID.'
    for key in section:
        if key not in known:
            everything = ["method", "num_speculative_tokens", *dict.fromkeys(known)]
            yield (
                f"{option}: method {manifest.name!r} has no option {key!r}.{nearest(key, everything)} "
                f"Known: {', '.join(everything)}."
            )


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


def _named(registry: Registry[M], name: str, decision: Decision[Any]) -> list[Entry[M]]:
    """The one candidate that the user named; an unknown name is an obstacle."""
    try:
        return [registry.get(name)]
    except UnknownNameError as error:
        decision.obstacles.append(str(error))
        return []


def _load(entry: Entry[Any], contract: str, decision: Decision[Any]) -> Any:
    """The candidate's class, or None after rejecting it: it cannot be imported or breaks its contract."""
    module, _, name = contract.partition(":")
    base = getattr(import_module(module), name)
    try:
        cls = entry.load()
    except PluginLoadError as error:
        problem = str(error)
    else:
        if not (inspect.isclass(cls) and issubclass(cls, base)):
            problem = f"{entry.target} of {entry.owner} is not a subclass of {module}.{name}."
        elif inspect.isabstract(cls):
            missing = ", ".join(sorted(name for name in dir(cls) if _is_abstract(cls, name)))
            problem = f"{entry.target} of {entry.owner} leaves methods of its contract undefined: {missing}."
        else:
            return cls
    decision.reject(entry, problem)
    decision.broken.append(problem)
    return None


def _is_abstract(cls: type, name: str) -> bool:
    return getattr(inspect.getattr_static(cls, name), "__isabstractmethod__", False) is True


def _either(values: Iterable[object]) -> str:
    return " or ".join(str(value) for value in values)


def _brief(section: Any) -> str:
    text = f"quantization_config {section!r}"
    return text if len(text) <= 120 else text[:117] + "..."
