"""The hooks: where a distribution tells Dovetail what it brings.

A plugin is a light module named by an entry point of group ``dovetail``::

    [project.entry-points.dovetail]
    mychip = "dovetail_mychip.plugin"

It implements any of the functions below with ``@dovetail.hookimpl``. Each receives ``register``, a callback that
takes a manifest and a lazy target (``"package.module:Attribute"``), imported only when it is used.

All hooks run once per process that discovers plugins (the command line's own process), in start-up, before torch is
imported; their results freeze into registries that every other process receives ready-made. A hook must import
nothing heavy and must not touch devices. It may raise: the exception is recorded as this plugin's failure, nothing
that it registered is kept, and other plugins are unaffected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

import pluggy

if TYPE_CHECKING:
    from dovetail.plugins.manifest import (
        AttentionManifest,
        CommandManifest,
        ModelManifest,
        PlatformManifest,
        QuantManifest,
        SpecDecoderManifest,
    )

PROJECT = "dovetail"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

M = TypeVar("M", contravariant=True)


class Register(Protocol[M]):
    """The callback that a registration hook receives."""

    def __call__(self, manifest: M, target: str) -> None:
        """Register one implementation.

        Args:
            manifest: what it is called and what it can do.
            target: ``"package.module:Attribute"``, imported on first use.

        Raises:
            PluginConflictError: the name is taken within this kind.
            PluginLoadError: the manifest is of the wrong type or the target is malformed.
        """
        ...


@hookspec
def dovetail_register_platforms(register: Register[PlatformManifest]) -> None:
    """Register chips: subclasses of :class:`dovetail.contracts.platform.Platform`.

    Process: the one that discovers plugins. May raise: yes, recorded as this plugin's failure. Since: 0.1.
    """


@hookspec
def dovetail_register_attention_backends(register: Register[AttentionManifest]) -> None:
    """Register attention: subclasses of :class:`dovetail.contracts.attention.AttentionBackend`.

    Process: the one that discovers plugins. May raise: yes, recorded as this plugin's failure. Since: 0.1.
    """


@hookspec
def dovetail_register_models(register: Register[ModelManifest]) -> None:
    """Register model families: subclasses of :class:`dovetail.contracts.model.Model`.

    Process: the one that discovers plugins. May raise: yes, recorded as this plugin's failure. Since: 0.1.
    """


@hookspec
def dovetail_register_quant_methods(register: Register[QuantManifest]) -> None:
    """Register number formats: subclasses of :class:`dovetail.contracts.quant.QuantMethod`.

    Process: the one that discovers plugins. May raise: yes, recorded as this plugin's failure. Since: 0.1.
    """


@hookspec
def dovetail_register_spec_decoders(register: Register[SpecDecoderManifest]) -> None:
    """Register speculators: subclasses of :class:`dovetail.contracts.specdec.SpecDecoder`.

    Process: the one that discovers plugins. May raise: yes, recorded as this plugin's failure. Since: 0.1.
    """


@hookspec
def dovetail_register_commands(register: Register[CommandManifest]) -> None:
    """Register commands of ``dovetail``: instances of :class:`click.Command`, groups included.

    Process: the one that discovers plugins. May raise: yes, recorded as this plugin's failure. Since: 0.1.
    """
