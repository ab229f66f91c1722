"""Sampling options of the commands that generate text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from dovetail.errors import ConfigError, RequestError
from dovetail.options import flag
from dovetail.sampling_params import SamplingParams

_OPTIONS = (
    click.option("--max-tokens", type=int, default=256, show_default=True, help="Most tokens to generate."),
    click.option("--temperature", type=float, help="0 is greedy; default: what the model recommends."),
    click.option("--top-p", type=float, help="Keep the likeliest tokens of this total probability."),
    click.option("--top-k", type=int, help="Keep this many of the likeliest tokens."),
    click.option(
        "--min-p", type=float, help="Drop tokens below this fraction of the likeliest one's probability."
    ),
    click.option("--stop", multiple=True, help="Text that ends generation; may be given several times."),
)


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--max-tokens``, ``--temperature``, ``--top-p``, ``--top-k``, ``--min-p`` and ``--stop``."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def given(values: dict[str, Any]) -> dict[str, Any]:
    """What the user set, ready for ``SamplingParams`` or a request body."""
    return {name: value for name, value in values.items() if value is not None and value != ()}


def check(values: dict[str, Any]) -> None:
    """Check every range, so that a wrong option is said before a model is loaded.

    Raises:
        ConfigError: naming the option, its value and the range.
    """
    try:
        SamplingParams(**given(values))
    except RequestError as error:
        name = error.param or ""
        raise ConfigError(str(error).replace(name, flag(name), 1)) from error
