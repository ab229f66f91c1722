"""Importing what a plugin registered, with the blame in the right place."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from dovetail.errors import PluginLoadError
from dovetail.plugins import remedy


def import_target(target: str, name: str, owner: str, distribution: str) -> Any:
    """What ``"package.module:Attribute"`` names.

    Args:
        name: as registered.
        owner: plugin, distribution and version, in words.

    Raises:
        PluginLoadError: the import failed or the attribute does not exist; says whose it is, why, and what to do.
    """
    module, _, attribute = target.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (Exception, SystemExit) as error:
        raise PluginLoadError(
            f"{name!r} of {owner} cannot be imported from {target}: {remedy.one_line(error)} "
            f"{remedy.for_exception(error, distribution, module)}"
        ) from error
