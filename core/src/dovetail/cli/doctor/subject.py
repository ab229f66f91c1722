"""What is examined: the options of a server, and what several checks look at, found once."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dovetail import checkpoint
from dovetail.errors import ConfigError
from dovetail.options import EngineOptions, ServerOptions
from dovetail.plugins.host import Discovery, PluginHost
from dovetail.plugins.registry import Registries
from dovetail.plugins.remedy import one_line

if TYPE_CHECKING:
    from dovetail.resolver import Explanation


class Subject:
    """One installation that is to run one server.

    Args:
        engine, server: the options that ``dovetail serve`` would get.
    """

    def __init__(self, engine: EngineOptions, server: ServerOptions) -> None:
        self.engine = engine
        self.server = server

    @cached_property
    def torch_error(self) -> str:
        """Why torch cannot be imported; empty if it can."""
        try:
            import torch  # noqa: F401
        except (Exception, SystemExit) as error:  # noqa: BLE001  a broken build raises whatever it likes
            return one_line(error)
        return ""

    @cached_property
    def discovery(self) -> Discovery:
        """The plugins.

        Raises:
            ConfigError: a variable about plugins is wrong.
        """
        return PluginHost().discover(warn=False)

    @property
    def registries(self) -> Registries | None:
        """What they register; None if discovery failed, which the check of plugins tells."""
        try:
            return self.discovery.registries
        except ConfigError:
            return None

    @cached_property
    def folder(self) -> Path | None:
        """The checkpoint, if it lies on this machine. Nothing is downloaded.

        Raises:
            ConfigError: there is no such checkpoint.
        """
        if self.registries is None:
            return None
        model = self.engine.model
        if model is not None and checkpoint.is_hub_id(model) and not checkpoint.local(model).exists():
            return checkpoint.in_cache(model, self.engine.revision)
        return checkpoint.select(self.engine, self.registries)[0]

    @cached_property
    def explanation(self) -> Explanation | None:
        """What the resolver says to the options; None if it cannot be asked."""
        if self.registries is None or self._absent():
            return None
        from dovetail import resolver

        return resolver.explain(self.engine, self.registries)

    def _absent(self) -> bool:
        try:
            return self.folder is None
        except ConfigError:
            return True
