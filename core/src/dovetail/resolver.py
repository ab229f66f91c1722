"""The resolver: what the user asks for × what is installed × what machine and model are → one configuration.

Every part has candidates in a declared order; each is taken, or rejected with its reasons. All obstacles are
collected before anything is refused, so that one look shows everything that has to change, and the nearest
configuration that works is searched for. ``auto`` picks by declared order and priority alone, and every decision can
be explained.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterable
from typing import Any

import msgspec

from dovetail.config import Change, EngineConfig
from dovetail.errors import ResolutionError
from dovetail.options import EngineOptions, arguments
from dovetail.plugins.registry import Registries
from dovetail.resolution.case import Case, Outcome
from dovetail.resolution.decision import Decision, Part
from dovetail.resolution.nearest import Found, Search

_logger = logging.getLogger("dovetail.resolver")


class Nearest(msgspec.Struct, frozen=True, kw_only=True):
    """The configuration that works and is nearest to a request that does not.

    Attributes:
        arguments: the command line that gives it, after the command.
        changes: the options that differ from the request, fewest possible.
    """

    arguments: tuple[str, ...]
    changes: tuple[Change, ...]


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """How the resolver decided.

    Attributes:
        model_name, model_path: of the checkpoint.
        parts: every part, in the order of decision.
        reasons: every obstacle to the request as it stands.
        nearest: what would work instead, if there are reasons and it was found.
        tried: configurations looked at for it.
        config: what runs, or None. With reasons it is the nearest configuration, which ``--allow-fallback`` takes.
    """

    model_name: str
    model_path: str
    parts: tuple[Part, ...]
    reasons: tuple[str, ...]
    nearest: Nearest | None = None
    tried: int = 0
    config: EngineConfig | None


def resolve(options: EngineOptions, registries: Registries) -> EngineConfig:
    """Decide what runs.

    Imports the chosen classes, and so torch.

    Raises:
        PluginLoadError: a plugin that ``DOVETAIL_PLUGINS`` names is broken.
        ConfigError: the checkpoint cannot be found or read.
        ResolutionError: the request cannot be honoured; holds every reason, and the nearest request that can.
    """
    registries.refuse_broken()
    explanation = explain(options, registries)
    if explanation.config is None:
        headline = f"Cannot run {explanation.model_name} as asked:"
        raise ResolutionError(headline, explanation.reasons, suggestion(explanation))
    for change in explanation.config.fallbacks:
        _logger.warning("Fallback: %s", describe(change))
    return explanation.config


def explain(options: EngineOptions, registries: Registries) -> Explanation:
    """Decide like :func:`resolve`, but tell how instead of refusing.

    Raises:
        ConfigError: the checkpoint cannot be found or read.
    """
    case = Case(options, registries)
    asked = case.decide(options)
    _warn_of_broken_candidates(asked.decisions)
    broken = registries.failures()
    found, tried = (None, 0) if broken or not asked.reasons else _search(case, options, asked)
    fallback = found if options.allow_fallback else None
    taken = asked if fallback is None else fallback.outcome
    config = None if broken else taken.config
    if config is not None and fallback is not None:
        config = msgspec.structs.replace(config, fallbacks=fallback.changes)
    return Explanation(
        model_name=case.name,
        model_path=str(case.path),
        parts=tuple(decision.explained() for decision in taken.decisions),
        reasons=(*broken, *asked.reasons),
        nearest=None if found is None else Nearest(arguments=tuple(arguments(found.options)), changes=found.changes),
        tried=tried,
        config=config,
    )


def suggestion(explanation: Explanation) -> str:
    """What would work instead of what was asked for, as one line; empty if there is nothing to suggest."""
    nearest = explanation.nearest
    if nearest is None:
        return f"Nearest that works: none found ({explanation.tried} others tried)." if explanation.tried else ""
    changed = "; ".join(f"{change.option} {change.asked} → {change.got}" for change in nearest.changes)
    words = shlex.join(nearest.arguments) or "no options"
    return f"Nearest that works: {words} (changed: {changed}). --allow-fallback takes it without asking."


def describe(change: Change) -> str:
    """One change and its reasons, as one line."""
    return f"{change.option} {change.asked} → {change.got}, since {' '.join(change.why)}"


def _search(case: Case, options: EngineOptions, asked: Outcome) -> tuple[Found | None, int]:
    search = Search(case, options, asked)
    found = search.run()
    return found, search.tried


def _warn_of_broken_candidates(decisions: Iterable[Decision[Any]]) -> None:
    """A candidate that should have been better and cannot even be imported is worth a line."""
    for decision in decisions:
        for line in decision.broken if decision.entry is not None else ():
            _logger.warning("%s It is passed over.", line)
