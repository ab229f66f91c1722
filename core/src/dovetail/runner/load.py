"""Import a resolved part by its target."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from dovetail.config import Selection
from dovetail.errors import PluginLoadError


def load_selection(selection: Selection) -> Any:
    """The class that a selection points to.

    Raises:
        PluginLoadError: the import failed; names the part, its distribution and version.
    """
    module, _, attribute = selection.target.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except Exception as error:
        raise PluginLoadError(
            f"{selection.name!r} of {selection.distribution} {selection.version} failed to import "
            f"{selection.target}: {type(error).__name__}: {error}"
        ) from error
