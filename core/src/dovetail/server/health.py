"""What ``/health`` says."""

from __future__ import annotations

import msgspec

from dovetail.plugins.registry import PluginStatus
from dovetail.server.service import Phase, Service


class Patient(msgspec.Struct, frozen=True, kw_only=True):
    """A plugin that is not well; the fields of :class:`PluginStatus`, without the traceback."""

    name: str
    distribution: str
    version: str
    state: str
    error: str | None
    remedy: str | None
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, plugin: PluginStatus) -> Patient:
        """What there is to say about it."""
        return cls(**{name: getattr(plugin, name) for name in cls.__struct_fields__})


class Health(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The body of the answer.

    Attributes:
        status: where the server is in its life.
        plugins: those that failed or have a warning.
        cause: why the engine is dead, on one line.
    """

    status: Phase
    plugins: tuple[Patient, ...]
    cause: str = ""

    @classmethod
    def of(cls, service: Service) -> Health:
        """Now."""
        patients = tuple(Patient.of(plugin) for plugin in service.plugins if not plugin.well)
        if service.client.dead.is_set():
            return cls(status=Phase.DEAD, plugins=patients, cause=service.client.summary)
        return cls(status=service.phase, plugins=patients)
