"""One model on one machine with one set of plugins: what is the same for every combination of options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dovetail import checkpoint, env
from dovetail.config import EngineConfig
from dovetail.options import EngineOptions
from dovetail.plugins.manifest import ModelManifest, PlatformManifest
from dovetail.plugins.registry import Registries
from dovetail.resolution import attention, context, draft, dtype, model, platform, quantization, scheduling, speculation
from dovetail.resolution.decision import Decision
from dovetail.sizes import GIB

if TYPE_CHECKING:
    from dovetail.contracts.model import ModelFacts

_AS_GIVEN = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "load_format",
    "memory_fraction",
    "eager",
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "scheduling_policy",
    "seed",
    "num_threads",
)
"""Options that the configuration takes over unchanged."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one set of options comes to.

    Attributes:
        decisions: every part, in the order of decision.
        reasons: every obstacle, of every part; empty if and only if there is a configuration.
        config: the configuration, or None.
        facts: of the model, if it has a family.
    """

    decisions: tuple[Decision[Any], ...]
    reasons: tuple[str, ...]
    config: EngineConfig | None
    facts: ModelFacts | None


class Case:
    """Decides for one checkpoint. A platform is probed once, however many sets of options are tried.

    Args:
        options: name the checkpoint; the sets decided on later may differ in anything else.

    Raises:
        ConfigError: the checkpoint cannot be found or read.
    """

    def __init__(self, options: EngineOptions, registries: Registries) -> None:
        self.registries = registries
        self.path, self.name = checkpoint.select(options, registries)
        self._hf_config = checkpoint.read_config(self.path)
        self._eos = checkpoint.eos_token_ids(self.path, self._hf_config)
        self._drafts: dict[str, draft.DraftFiles] = {}
        self._chips: dict[str, Decision[PlatformManifest]] = {}
        self._families: dict[str | None, tuple[Decision[ModelManifest], ModelFacts | None]] = {}

    def decide(self, options: EngineOptions) -> Outcome:
        """Every part's decision, and the configuration if nothing stands in its way."""
        chip, family, facts = self._chip_and_family(options)
        activation, dtype_obstacles = dtype.decide(options, chip, family, facts)
        length, length_obstacles = context.decide(options, chip.entry, facts)
        speculator, num_drafts, spec_options = speculation.decide(options, self.registries, chip.entry)
        backend = attention.decide(
            options, self.registries, chip.entry, facts, activation, length, speculator.entry
        )
        weights = quantization.decide(options, self.registries, self._hf_config, activation, chip.entry, facts)
        decisions: tuple[Decision[Any], ...] = (chip, family, backend, weights, speculator)
        drafter = None
        if speculator.entry is not None and "model" in spec_options:
            drafter = draft.decide(
                self._draft_files(spec_options["model"]),
                draft.Beside(
                    options=options,
                    registries=self.registries,
                    facts=facts,
                    platform=chip.entry,
                    backend=backend.entry,
                    dtype=activation,
                    length=length,
                ),
            )
            decisions += drafter.decisions
        platform_options, platform_gaps = platform.settings(options, chip.entry)
        async_scheduling, scheduling_gaps = scheduling.decide(options, chip.entry)
        reasons = [reason for decision in decisions for reason in decision.obstacles]
        reasons += [*platform_gaps, *scheduling_gaps]
        reasons += [*dtype_obstacles, *dtype.kv_gaps(options, chip, activation), *length_obstacles]
        config = None
        if not reasons:
            assert facts is not None, "no reasons, so every part is decided"
            assert activation is not None
            assert length is not None
            config = EngineConfig(
                model_path=str(self.path),
                model_name=self.name,
                hf_config=self._hf_config,
                model=family.selection(),
                platform=chip.selection(),
                attention=backend.selection(),
                quant=weights.selection(),
                spec_decoder=None if speculator.entry is None else speculator.selection(),
                dtype=activation,
                kv_dtype=activation if options.kv_cache_dtype == "auto" else options.kv_cache_dtype,
                vocab_size=facts.vocab_size,
                eos_token_ids=self._eos,
                max_model_len=length,
                kv_cache_memory=None if options.kv_cache_memory is None else int(options.kv_cache_memory * GIB),
                compile_cache=options.compile_cache or env.compile_cache(),
                platform_options=platform_options,
                async_scheduling=async_scheduling,
                num_speculative_tokens=num_drafts,
                spec_options=spec_options,
                rejected={d.part: d.explained().rejected for d in decisions if d.rejected},
                **{name: getattr(options, name) for name in _AS_GIVEN},
            )
            if drafter is not None:
                config = drafter.add_to(config)
        return Outcome(decisions, tuple(reasons), config, facts)

    def _draft_files(self, name: str) -> draft.DraftFiles:
        """What is read of a draft checkpoint, kept."""
        if name not in self._drafts:
            self._drafts[name] = draft.DraftFiles.read(name, self.path)
        return self._drafts[name]

    def _chip_and_family(
        self, options: EngineOptions
    ) -> tuple[Decision[PlatformManifest], Decision[ModelManifest], ModelFacts | None]:
        """The decisions that import and probe, kept."""
        if options.platform not in self._chips:
            self._chips[options.platform] = platform.decide(options, self.registries)
        chip = self._chips[options.platform]
        name = None if chip.entry is None else chip.entry.name
        if name not in self._families:
            self._families[name] = model.decide(self._hf_config, self.registries, chip.entry)
        return chip, *self._families[name]
