"""Requirements in the notation of PEP 508, compared with what is installed; nothing is imported."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from typing import TYPE_CHECKING

from dovetail.errors import PluginLoadError

if TYPE_CHECKING:
    from packaging.requirements import Requirement


def parse(requirement: str) -> Requirement:
    """One requirement.

    Raises:
        PluginLoadError: it is not written as PEP 508 wants it.
    """
    from packaging.requirements import InvalidRequirement, Requirement  # not needed where nothing is required

    try:
        return Requirement(requirement)
    except InvalidRequirement as error:
        reason = str(error).splitlines()[0]
        raise PluginLoadError(
            f"requires holds {requirement!r}, which is no requirement of PEP 508 ({reason}); write it as 'fancy>=2'."
        ) from error


def unmet(requirements: Iterable[str]) -> list[str]:
    """Those that this environment does not meet; markers that do not apply here are met."""
    return [str(_bare(wanted)) for wanted in map(parse, requirements) if not _is_met(wanted)]


def unmet_by(distribution: str) -> list[str]:
    """What a distribution declares to depend on and this environment lacks; empty if it is not installed itself."""
    try:
        return unmet(metadata.requires(distribution) or ())
    except metadata.PackageNotFoundError:
        return []


def installed_version(name: str) -> str | None:
    """Of a distribution; None if there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def pip_install(requirements: Iterable[str]) -> str:
    """The command that brings them."""
    return " ".join(["pip install", *(f"'{requirement}'" for requirement in requirements)])


def explain_unmet(requirements: Iterable[str], bundle: str = "") -> str:
    """What is missing and the command that brings it; empty if nothing is.

    Args:
        bundle: a requirement that brings all of them.
    """
    missing = unmet(requirements)
    if not missing:
        return ""
    command = pip_install([bundle] if bundle else missing)
    return f"requires {', '.join(map(_with_installed, missing))}; run: {command}"


def _with_installed(requirement: str) -> str:
    version = installed_version(parse(requirement).name)
    return f"{requirement}, which is not installed" if version is None else f"{requirement}, and {version} is installed"


def _is_met(wanted: Requirement) -> bool:
    if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
        return True
    version = installed_version(wanted.name)
    return version is not None and wanted.specifier.contains(version, prereleases=True)


def _bare(wanted: Requirement) -> Requirement:
    wanted.marker = None
    return wanted
