"""An engine over this process's own device. Importing this module imports torch."""

from __future__ import annotations

from dovetail.config import EngineConfig
from dovetail.contracts.executor import ExecutorInfo, Progress
from dovetail.engine.engine import Engine
from dovetail.options import EngineOptions
from dovetail.plugins.registry import Registries
from dovetail.resolver import resolve
from dovetail.runner.executor import LocalExecutor


def build_engine(
    options: EngineOptions, registries: Registries, progress: Progress
) -> tuple[Engine, EngineConfig, ExecutorInfo]:
    """Resolve the options, load the model and warm up.

    Raises:
        DovetailError: the options cannot be honoured, or the checkpoint does not fit.
    """
    config = resolve(options, registries)
    executor = LocalExecutor(config)
    info = executor.load(progress)
    return Engine(config, executor, info), config, info
