"""What ``/v1/config`` says: the options asked for, what came of them, and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from dovetail.config import EngineConfig
from dovetail.contracts.executor import ExecutorInfo
from dovetail.options import ServerOptions, asked
from dovetail.plugins.registry import PluginStatus
from dovetail.server.service import Service


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """The body of the answer.

    Attributes:
        asked: options of engine and server that differ from their defaults, the API key left out.
        engine: what runs: every part with who brings it and why, the candidates that were not taken and why not, every
            value, and what ``--allow-fallback`` changed.
        executor: sizes that were settled while loading.
        sampling_defaults: what the checkpoint recommends.
        plugins: what became of each; tracebacks stay with ``dovetail plugins``.
    """

    asked: Mapping[str, Any]
    engine: EngineConfig
    executor: ExecutorInfo
    sampling_defaults: Mapping[str, Any]
    plugins: tuple[PluginStatus, ...]

    @classmethod
    def of(cls, service: Service) -> Configuration:
        """Of the model that is served.

        Raises:
            EngineOverloadedError: the server starts or drains. EngineDeadError: the engine is gone.
        """
        model = service.served()
        return cls(
            asked={**model.asked, **_public(service.options)},
            engine=model.config,
            executor=model.info,
            sampling_defaults=model.defaults,
            plugins=tuple(msgspec.structs.replace(plugin, traceback=None) for plugin in service.plugins),
        )


def _public(options: ServerOptions) -> dict[str, Any]:
    return {name: value for name, value in asked(options).items() if name != "api_key"}
