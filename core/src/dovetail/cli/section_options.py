"""Platforms' own options as options of commands: ``--<platform>-<name> VALUE`` for each of ``defaults``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from typing import Any

import click

from dovetail.errors import ConfigError
from dovetail.options import flag
from dovetail.plugins.host import PluginHost

_OPTIONS = f"{__name__}.options"
_GIVEN = f"{__name__}.given"


class EngineCommand(click.Command):
    """A command that runs an engine. Plugins are discovered only if a word is no option of the command's own."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As its base, with the options of platforms."""
        known = {name for param in self.params for name in (*param.opts, *param.secondary_opts)}
        words = {word.partition("=")[0] for word in args if word.startswith("-")}
        if "--model" in words - known:
            raise click.UsageError(f"The model is no option, but an argument: {ctx.command_path} PATH_OR_HUB_ID", ctx)
        if words - known:
            ctx.meta[_OPTIONS] = [option for option in platform_options() if known.isdisjoint(option.opts)]
        return super().parse_args(ctx, args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Its own, and those that were discovered."""
        return [*super().get_params(ctx), *ctx.meta.get(_OPTIONS, [])]


def overlay(values: dict[str, Any]) -> None:
    """Put what the command line gives of a platform's options into the options of the engine.

    Raises:
        ConfigError: another platform is asked for.
    """
    context = click.get_current_context(silent=True)
    given: Mapping[str, Mapping[str, Any]] = {} if context is None else context.meta.get(_GIVEN, {})
    for platform, section in given.items():
        asked = values.get("platform", "auto")
        if asked not in ("auto", platform):
            name = flag(f"{platform}-{next(iter(section))}")
            raise ConfigError(f"{name} is an option of platform {platform!r}, and the platform is {asked!r}; drop one.")
        values["platform"] = platform
        values["platform_config"] = {**(values.get("platform_config") or {}), **section}


def platform_options() -> Iterator[click.Option]:
    """Those of every platform that is installed."""
    with redirect_stdout(sys.stderr):  # what plugins print is no part of an answer
        platforms = PluginHost().discover().registries.platforms
    for platform in platforms.names():
        for name, default in platforms.get(platform).manifest.defaults.items():
            yield _option(platform, name, default)


def _option(platform: str, name: str, default: object) -> click.Option:
    spelling = flag(f"{platform}-{name}")
    is_flag = isinstance(default, bool)
    shown = str(default).lower() if is_flag else default
    return click.Option(
        [f"{spelling}/--no-{spelling[2:]}" if is_flag else spelling],
        type=None if is_flag else _type_of(default),
        default=None,
        expose_value=False,
        callback=_noting(platform, name),
        help=f"Option {name!r} of platform {platform!r}; giving it chooses that platform.  [default: {shown}]",
    )


def _type_of(default: object) -> Any:
    return type(default) if isinstance(default, int | float) else _json if isinstance(default, list | dict) else str


def _json(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not JSON: {error}.") from None


def _noting(platform: str, name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def note(context: click.Context, _: click.Parameter, value: Any) -> None:
        if value is not None:
            context.meta.setdefault(_GIVEN, {}).setdefault(platform, {})[name] = value

    return note
