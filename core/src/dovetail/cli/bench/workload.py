"""The synthetic workload that the measurements share: random prompts of a fixed length."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import click

FIRST_ORDINARY_TOKEN = 16
"""Lower ids are often special tokens."""

_OPTIONS = (
    click.option(
        "--input-len", type=click.IntRange(1), default=128, show_default=True, help="Tokens per prompt."
    ),
    click.option(
        "--output-len",
        type=click.IntRange(1),
        default=128,
        show_default=True,
        help="Tokens generated per request.",
    ),
    click.option(
        "--vocab-size",
        type=click.IntRange(FIRST_ORDINARY_TOKEN + 1),
        default=1000,
        show_default=True,
        help="Prompt tokens are drawn at random below this id.",
    ),
)


def workload_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--input-len``, ``--output-len`` and ``--vocab-size``."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """``count`` prompts of ``length`` token ids; the same for the same seed."""
    draw = random.Random(seed)
    return [[draw.randrange(FIRST_ORDINARY_TOKEN, vocab_size) for _ in range(length)] for _ in range(count)]
