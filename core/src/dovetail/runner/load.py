"""Import a resolved part by its target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dovetail.config import EngineConfig, Selection
from dovetail.contracts.platform import PlatformConfig
from dovetail.plugins.target import import_target


def load_selection(selection: Selection) -> Any:
    """The class that a selection points to.

    Raises:
        PluginLoadError: the import failed; names the part, its owner, the cause and what to do.
    """
    return import_target(selection.target, selection.name, selection.owner, selection.distribution)


def platform_config(config: EngineConfig) -> PlatformConfig:
    """What a configuration says to its platform."""
    return PlatformConfig(
        num_threads=config.num_threads,
        eager=config.eager,
        cache=None if config.compile_cache is None else Path(config.compile_cache),
        options=config.platform_options,
    )
