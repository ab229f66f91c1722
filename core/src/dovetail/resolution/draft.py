"""Which draft model runs beside the engine's, for speculators that need one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from dovetail import checkpoint
from dovetail.config import EngineConfig
from dovetail.errors import ConfigError
from dovetail.options import EngineOptions
from dovetail.plugins.manifest import AttentionManifest, ModelManifest, PlatformManifest, QuantManifest
from dovetail.plugins.registry import Entry, Registries
from dovetail.plugins.remedy import one_line
from dovetail.resolution import attention, model, quantization
from dovetail.resolution.decision import Decision

if TYPE_CHECKING:
    from dovetail.contracts.model import ModelFacts

TOKENIZER = "tokenizer.json"
_OTHER = 'choose another "model" in --speculative-config'


@dataclass(frozen=True, slots=True)
class DraftFiles:
    """What is read of a draft checkpoint, once.

    Attributes:
        name: path or hub id, as given.
        problem: why it cannot be used whatever the options are; empty if it can.
    """

    name: str
    path: Path
    hf_config: Mapping[str, Any]
    problem: str

    @classmethod
    def read(cls, name: str, target: Path) -> DraftFiles:
        """Find a checkpoint, and compare its tokenizer with that of the model in ``target``."""
        try:
            path = checkpoint.locate(name)
            return cls(name, path, checkpoint.read_config(path), _tokenizer_gap(path, target))
        except ConfigError as error:
            return cls(name, Path(), {}, str(error))


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """What is decided of the engine's own model, and so of the draft's.

    Attributes:
        length: longest context served.
    """

    options: EngineOptions
    registries: Registries
    facts: ModelFacts | None
    platform: Entry[PlatformManifest] | None
    backend: Entry[AttentionManifest] | None
    dtype: str | None
    length: int | None


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft model while it is decided: its checkpoint, and which plugins give it."""

    files: DraftFiles
    family: Decision[ModelManifest]
    weights: Decision[QuantManifest]

    @property
    def decisions(self) -> tuple[Decision[Any], ...]:
        """For the explanation."""
        return self.family, self.weights

    def add_to(self, config: EngineConfig) -> EngineConfig:
        """The engine's configuration with the draft model's in it; only without obstacles."""
        own = msgspec.structs.replace(
            config,
            model_path=str(self.files.path),
            model_name=self.files.name,
            hf_config=dict(self.files.hf_config),
            model=self.family.selection(),
            quant=self.weights.selection(),
            spec_decoder=None,
            spec_options={},
            rejected={},
        )
        options = {key: value for key, value in config.spec_options.items() if key != "model"}
        return msgspec.structs.replace(config, spec_options=options, draft=own)


def decide(files: DraftFiles, beside: Beside) -> Draft:
    """The plugins that serve a draft checkpoint, in the number format of its own files."""
    if files.problem:
        return Draft(files, Decision(part="draft model", obstacles=[f"draft model: {files.problem}"]), _weights())
    family, facts = model.decide(files.hf_config, beside.registries, beside.platform)
    plain = replace(beside.options, quantization=None)
    weights = quantization.decide(
        plain, beside.registries, files.hf_config, beside.dtype, beside.platform, facts
    )
    if facts is not None:
        family.obstacles += _gaps(facts, beside)
    family.part, weights.part = "draft model", _weights().part
    for decision in (family, weights):
        decision.obstacles[:] = [f"draft model {files.name}: {obstacle}" for obstacle in decision.obstacles]
    return Draft(files, family, weights)


def _weights() -> Decision[QuantManifest]:
    return Decision(part="draft quantization")


def _gaps(facts: ModelFacts, beside: Beside) -> Iterable[str]:
    """Why a checkpoint cannot draft for the engine's."""
    if beside.facts is not None and facts.vocab_size != beside.facts.vocab_size:
        yield f"its vocabulary has {facts.vocab_size} tokens, and the model's has {beside.facts.vocab_size}; {_OTHER}."
    if beside.length is not None and facts.max_positions < beside.length:
        yield (
            f"it was made for {facts.max_positions} positions, and --max-model-len is {beside.length}; "
            f"choose --max-model-len {facts.max_positions}, or {_OTHER}."
        )
    if beside.backend is not None:
        for gap in attention.need_gaps(beside.backend.manifest, facts, None):
            yield f"attention backend {beside.backend.name!r}, which it shares with the model, {gap}"


def _tokenizer_gap(path: Path, target: Path) -> str:
    """That two checkpoints' tokenizers differ, in words; empty if they agree, or one of them brings none."""
    files = path / TOKENIZER, target / TOKENIZER
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return ""
    try:
        own, others = map(_vocabulary, files)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # not what a tokenizer.json looks like
        return f"its tokenizer cannot be compared with the model's: {one_line(error)} {_OTHER}."
    for token in sorted(own.keys() | others.keys()):
        if own.get(token) != others.get(token):
            return (
                f"the tokenizer of {path} gives token {token!r} the id {own.get(token)}, and the model's "
                f"{others.get(token)}, so drafts would mean other text; {_OTHER}."
            )
    return ""


def _vocabulary(file: Path) -> dict[str, int]:
    """Token -> id, added ones included."""
    content = checkpoint.read_object(file)
    known = content.get("model", {}).get("vocab", {})
    ids = known if isinstance(known, dict) else {token: i for i, (token, *_) in enumerate(known)}
    return {**ids, **{added["content"]: added["id"] for added in content.get("added_tokens", [])}}
