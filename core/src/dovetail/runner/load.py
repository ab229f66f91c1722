"""Import a resolved part by its target."""

from __future__ import annotations

from typing import Any

from dovetail.config import Selection
from dovetail.plugins.target import import_target


def load_selection(selection: Selection) -> Any:
    """The class that a selection points to.

    Raises:
        PluginLoadError: the import failed; names the part, its owner, the cause and what to do.
    """
    return import_target(selection.target, selection.name, selection.owner, selection.distribution)
