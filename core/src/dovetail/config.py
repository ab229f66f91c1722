"""The resolved configuration: what runs. Torch-free and msgspec-encodable, so every process gets one decision."""

from __future__ import annotations

from typing import Any

import msgspec

from dovetail.plugins.registry import owner


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """One resolved part.

    Attributes:
        name: as registered.
        target: ``"package.module:Attribute"`` to import.
        distribution, version: who brings it.
        why: why it was chosen, in words.
        plugin: the entry-point name of the plugin that registered it.
        claims: its manifest, as builtins: what the executor holds it to.
    """

    name: str
    target: str
    distribution: str
    version: str
    why: str
    plugin: str = ""
    claims: dict[str, Any] = {}

    @property
    def owner(self) -> str:
        """Plugin, distribution and version, in words."""
        return owner(self.plugin, self.distribution, self.version)


class Rejected(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate that was not taken, and why."""

    name: str
    plugin: str
    distribution: str
    reasons: tuple[str, ...]


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One option that had to change for the rest to work.

    Attributes:
        option: as on the command line, e.g. ``"--attention"``.
        asked, got: its value before and after, as one would type it; ``"(not given)"`` where it is left out.
        why: the obstacles that the change removes.
    """

    option: str
    asked: str
    got: str
    why: tuple[str, ...]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine runs. Made by :func:`dovetail.resolver.resolve` alone.

    Attributes:
        model_path: local folder of the checkpoint.
        model_name: what the user typed, or the demo's name.
        hf_config: config.json.
        dtype, kv_dtype: torch dtype names, e.g. ``"bfloat16"``.
        vocab_size: rows of the output head.
        eos_token_ids: from generation_config.json, else config.json.
        kv_cache_memory: bytes, or None for the default rule.
        memory_fraction: share of the device's own memory that the engine may take, or None for the default.
        compile_cache: folder that outlives the engine, for what the platform compiles; None keeps nothing.
        eager: run each operation as it comes.
        async_scheduling: whether a step is planned while the one before it runs.
        load_format: where weights come from.
        platform_options: the platform's own section.
        spec_options: the speculator's own section; ``num_speculative_tokens`` is 0 without a speculator.
        draft: what runs beside the model to draft for it, if the speculator needs a draft model.
        rejected: per part, the candidates that were not taken.
        fallbacks: what ``--allow-fallback`` changed of what was asked for; empty if it runs as asked.
    """

    model_path: str
    model_name: str
    hf_config: dict[str, Any]
    model: Selection
    platform: Selection
    attention: Selection
    quant: Selection
    spec_decoder: Selection | None
    dtype: str
    kv_dtype: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    kv_cache_memory: int | None
    enable_prefix_caching: bool
    enable_chunked_prefill: bool
    scheduling_policy: str
    seed: int
    num_threads: int | None
    async_scheduling: bool = False
    load_format: str = "safetensors"
    memory_fraction: float | None = None
    compile_cache: str | None = None
    eager: bool = False
    platform_options: dict[str, Any] = {}
    num_speculative_tokens: int = 0
    spec_options: dict[str, Any] = {}
    draft: EngineConfig | None = None
    rejected: dict[str, tuple[Rejected, ...]] = {}
    fallbacks: tuple[Change, ...] = ()
