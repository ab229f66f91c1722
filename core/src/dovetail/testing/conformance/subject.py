"""What a suite tests: a class and what is declared about it."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from dovetail.config import Selection
from dovetail.plugins.host import PluginHost
from dovetail.plugins.manifest import Manifest
from dovetail.plugins.registry import Registries


@dataclass(frozen=True, eq=False, slots=True)
class Tested:
    """A class under test.

    Attributes:
        cls: the class itself; of a command, the command.
        manifest: what is declared about it.
        selection: the same as a resolved part, from which an engine builds it.
    """

    __test__: ClassVar = False
    """Not a class of tests, though its name begins like one; test files import everything from here."""

    cls: Any
    manifest: Any
    selection: Selection


class Subject(ABC):
    """Names what is tested; see :func:`registered` and :func:`unregistered`."""

    @abstractmethod
    def find(self, kind: str) -> Tested:
        """The class and its manifest.

        Args:
            kind: field of :class:`~dovetail.plugins.registry.Registries` that the suite belongs to.

        Raises:
            DovetailError: nothing of that name is registered, or it cannot be imported.
        """
        ...


def registered(name: str, registries: Registries | None = None) -> Subject:
    """What an installed plugin registers under ``name``, of the kind that the suite is for.

    Args:
        registries: where to look; the default discovers what is installed, once per process.
    """
    return _Registered(name, registries)


def unregistered(cls: Any, manifest: Manifest) -> Subject:
    """A class (or a command) that no plugin registers (yet), with the manifest that it would be registered with."""
    return _Unregistered(cls, manifest)


@dataclass(frozen=True, eq=False, slots=True)
class _Registered(Subject):
    name: str
    registries: Registries | None

    def find(self, kind: str) -> Tested:
        registries = self.registries if self.registries is not None else installed()
        entry = registries.by_kind()[kind].get(self.name)
        selection = Selection(
            name=entry.name,
            target=entry.target,
            distribution=entry.distribution,
            version=entry.version,
            plugin=entry.plugin,
            why="tested",
        )
        return Tested(entry.load(), entry.manifest, selection)


@dataclass(frozen=True, eq=False, slots=True)
class _Unregistered(Subject):
    cls: Any
    manifest: Manifest

    def find(self, kind: str) -> Tested:
        return Tested(self.cls, self.manifest, selection_of(self.cls, self.manifest.name))


def selection_of(cls: Any, name: str) -> Selection:
    """A resolved part that stands for ``cls``, wherever in this process it is defined: in a test function, say."""
    attribute = f"{getattr(cls, '__name__', 'target')}_{id(cls):x}"
    setattr(sys.modules[__name__], attribute, cls)
    return Selection(
        name=name, target=f"{__name__}:{attribute}", distribution="(not installed)", version="0", why="tested"
    )


@cache
def installed() -> Registries:
    """What the installed plugins register."""
    return PluginHost().discover(warn=False).registries
