"""Whose fault an exception is: that of the selected part whose code was deepest on the stack when it was raised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from traceback import walk_tb
from types import FrameType
from typing import NamedTuple

from dovetail.config import EngineConfig, Selection
from dovetail.errors import DovetailError, PluginError
from dovetail.plugins import remedy

CORE = "dovetail"
"""The core's own package: its parts are never to blame for what runs inside of them."""

_CHOICES = {
    "platform": "or choose another --platform",
    "model": "or serve another model",
    "attention": "or choose another --attention",
    "quant": "or choose another --quantization",
    "spec_decoder": "or leave out --speculative-config",
    "draft.model": "or draft with another model",
    "draft.quant": "or draft with another checkpoint",
}


class Culprit(NamedTuple):
    """A part (its field in the configuration, and the selection), and where its code stood."""

    role: str
    part: Selection
    place: str
    raised: bool
    """Whether that very code raised, rather than something that it called."""


@contextmanager
def blaming(config: EngineConfig, doing: str, kind: type[PluginError]) -> Iterator[None]:
    """Exceptions that pass through a plugin's code say whose it is.

    Args:
        doing: what goes on, for the message: ``"loading"``.
        kind: what an unforeseen exception becomes. A :class:`DovetailError` keeps its type and text, and gains the
            owner if the plugin itself raised it.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        culprit = find(error, parts(config))
        if culprit is None:
            raise
        if isinstance(error, DovetailError):
            if culprit.raised and culprit.part.owner not in str(error):
                error.args = (f"{error} (Raised by {culprit.part.owner}.)",)
            raise
        raise kind(_message(error, culprit, doing)) from error


def parts(config: EngineConfig) -> dict[str, Selection]:
    """The selected parts, by their field in the configuration; a draft model's own behind those of the engine."""
    found: dict[str, Selection | None] = {
        "platform": config.platform,
        "model": config.model,
        "attention": config.attention,
        "quant": config.quant,
        "spec_decoder": config.spec_decoder,
    }
    if config.draft is not None:
        found |= {"draft.model": config.draft.model, "draft.quant": config.draft.quant}
    return {role: part for role, part in found.items() if part is not None}


def find(error: BaseException, candidates: Mapping[str, Selection]) -> Culprit | None:
    """Who is to blame; None if no plugin's code was on the stack."""
    culprit = None
    for frame, line in walk_tb(error.__traceback__):
        owned = _owner_of(frame.f_globals.get("__name__", ""), candidates)
        if owned is None:
            culprit = culprit._replace(raised=False) if culprit else None
        else:
            culprit = Culprit(*owned, _place(frame, line), True)
    return culprit


def _owner_of(module: str, candidates: Mapping[str, Selection]) -> tuple[str, Selection] | None:
    """The part whose target is nearest to a module within the same package."""
    package = module.partition(".")[0]
    near = [
        (role, part) for role, part in candidates.items() if part.target.partition(".")[0].partition(":")[0] == package
    ]
    if not near or package == CORE:
        return None
    return max(near, key=lambda item: _shared(item[1].target.partition(":")[0], module))


def _shared(target: str, module: str) -> int:
    """Leading dotted parts that two modules have in common."""
    count = 0
    for a, b in zip(target.split("."), module.split("."), strict=False):
        if a != b:
            break
        count += 1
    return count


def _place(frame: FrameType, line: int) -> str:
    return f"{frame.f_code.co_filename}:{line} in {frame.f_code.co_name}"


def _message(error: BaseException, culprit: Culprit, doing: str) -> str:
    part = culprit.part
    cure = remedy.for_exception(error, part.distribution, part.target.partition(":")[0])
    return (
        f"{part.name!r} of {part.owner} failed while {doing}: {remedy.one_line(error)} It stood at {culprit.place}. "
        f"{cure.rstrip('.')}, {_CHOICES[culprit.role]}."
    )
