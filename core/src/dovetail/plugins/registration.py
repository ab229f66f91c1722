"""What a plugin may register, through which hook, and whether one registration is in order."""

from __future__ import annotations

import inspect
import re
from types import ModuleType
from typing import Any

import msgspec

from dovetail import hookspecs
from dovetail.contracts import API_VERSIONS, accepted
from dovetail.errors import PluginLoadError
from dovetail.plugins.manifest import (
    AttentionManifest,
    CommandManifest,
    Manifest,
    ModelManifest,
    PlatformManifest,
    QuantManifest,
    SpecDecoderManifest,
)
from dovetail.plugins.registry import Entry, nearest
from dovetail.plugins.requirements import parse

_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class Hook(msgspec.Struct, frozen=True):
    """One registration hook: which registry it fills, with which manifests, of which contract."""

    name: str
    kind: str
    manifest: type[Manifest]
    contract: str


HOOKS = (
    Hook("dovetail_register_platforms", "platforms", PlatformManifest, "platform"),
    Hook("dovetail_register_attention_backends", "attention", AttentionManifest, "attention"),
    Hook("dovetail_register_models", "models", ModelManifest, "model"),
    Hook("dovetail_register_quant_methods", "quant", QuantManifest, "quant"),
    Hook("dovetail_register_spec_decoders", "spec_decoders", SpecDecoderManifest, "specdec"),
    Hook("dovetail_register_commands", "commands", CommandManifest, "command"),
)


def check_functions(module: Any) -> list[str]:
    """Refuse functions that look like hooks and would never be called.

    Returns:
        Names of the hooks that the module implements.

    Raises:
        PluginLoadError: a function's name begins like a hook's but is none, or it lacks ``@hookimpl``.
    """
    if not isinstance(module, ModuleType):
        raise PluginLoadError(f"The entry point names {module!r}; it must name a module, without an attribute.")
    known = [hook.name for hook in HOOKS]
    found = []
    for name, function in vars(module).items():
        if not name.startswith("dovetail_") or not inspect.isfunction(function):
            continue
        if name not in known:
            raise PluginLoadError(f"{name} is not a hook.{nearest(name, known)} Hooks: {', '.join(known)}.")
        if not hasattr(function, f"{hookspecs.PROJECT}_impl"):
            raise PluginLoadError(f"{name} lacks @dovetail.hookimpl, so it would never be called; add it.")
        found.append(name)
    return found


def read_manifest(hook: Hook, manifest: object) -> Manifest:
    """A manifest as every process reads it: its fields have the declared types, lists have become tuples.

    Raises:
        PluginLoadError: it is of another kind, or a field has the wrong type.
    """
    if not isinstance(manifest, hook.manifest):
        raise PluginLoadError(f"{hook.name} registers {manifest!r}; it must be a {hook.manifest.__name__}.")
    try:
        return msgspec.convert(msgspec.to_builtins(manifest), hook.manifest)
    except (TypeError, ValueError) as error:  # msgspec: the first names the type that it cannot encode
        raise PluginLoadError(
            f"{hook.name} registers {manifest.name!r} with a field of the wrong type: {error}; write it as "
            f"{hook.manifest.__name__} declares it."
        ) from error


def check_registration(hook: Hook, entry: Entry[Any]) -> None:
    """Refuse a registration that could never work.

    Raises:
        PluginLoadError: it is for another contract version, or its name, its target or a requirement is malformed.
    """
    manifest, target = entry.manifest, entry.target
    if not _NAME.fullmatch(manifest.name):
        raise PluginLoadError(
            f"{hook.name} registers the name {manifest.name!r}; use letters, digits and . _ + - only."
        )
    if not isinstance(target, str) or not _TARGET.fullmatch(target):
        raise PluginLoadError(
            f"{hook.name} registers {manifest.name!r} with target {target!r}; "
            "write it as 'package.module:Attribute'."
        )
    for requirement in manifest.requires:
        parse(requirement)
    if manifest.api not in accepted(hook.contract):
        raise PluginLoadError(f"{hook.name} registers {_version_gap(hook, entry)}")


def _version_gap(hook: Hook, entry: Entry[Any]) -> str:
    """Which versions do not meet, and which side has to move."""
    given, versions = entry.manifest.api, accepted(hook.contract)
    speaks = " and ".join(str(version) for version in versions)
    behind = entry.distribution if given < versions[0] else "dovetail-core"
    change = f"Install a newer release of {behind}"
    return (
        f"{entry.manifest.name!r} for version {given} of the {hook.contract} contract; this core speaks version "
        f"{API_VERSIONS[hook.contract]} and accepts plugins made for {speaks}. {change}."
    )
