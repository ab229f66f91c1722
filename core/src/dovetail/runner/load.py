"""Import a resolved part by its target."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

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
        workload=_workload(config),
        options=config.platform_options,
    )


def _workload(config: EngineConfig) -> str:
    """What is the same for two engines that run the same steps."""
    elsewhere: dict[str, Any] = {
        "model_path": "",
        "model_name": "",
        "compile_cache": None,
        "seed": 0,
        "rejected": {},
        "fallbacks": (),
    }
    return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(config, **elsewhere))).hexdigest()
