"""Which model family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dovetail import checkpoint
from dovetail.errors import ConfigError, DovetailError
from dovetail.plugins.manifest import ModelManifest, PlatformManifest
from dovetail.plugins.registry import Entry, Registries, Registry, nearest
from dovetail.resolution import needs
from dovetail.resolution.decision import Decision, load

if TYPE_CHECKING:
    from dovetail.contracts.model import ModelFacts


def decide(
    hf_config: Mapping[str, Any], registries: Registries, platform: Entry[PlatformManifest] | None
) -> tuple[Decision[ModelManifest], ModelFacts | None]:
    """The family that serves the checkpoint's architecture; a platform's own version goes by priority."""
    decision: Decision[ModelManifest] = Decision(part="model")
    facts = None
    try:
        architectures = checkpoint.architectures(hf_config)
    except ConfigError as error:
        decision.obstacles.append(str(error))
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
        cls = load(entry, "dovetail.contracts.model:Model", decision)
        if cls is None:
            continue
        try:
            facts = _facts(cls, hf_config)
        except DovetailError as error:
            decision.reject(entry, str(error))
        except (Exception, SystemExit) as error:  # noqa: BLE001  the family cannot read this config
            decision.reject(entry, f"cannot read config.json: {type(error).__name__}: {error}")
        else:
            decision.take(entry, cls, f"serves {', '.join(architectures)}")
    if decision.entry is None:
        decision.refuse_rejected("model family")
    elif facts is not None and needs.unknown(facts.needs):
        decision.obstacles.append(
            f"model family {decision.entry.name!r} of {decision.entry.distribution} needs "
            f"{', '.join(needs.unknown(facts.needs))}, which this core does not know; install matching releases."
        )
    return decision, facts


def _facts(cls: Any, hf_config: Mapping[str, Any]) -> ModelFacts:
    from dovetail.contracts.model import ModelFacts

    facts = cls.facts(hf_config)
    if not isinstance(facts, ModelFacts):
        raise TypeError(f"its facts are {facts!r}, not ModelFacts")
    return facts


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
