"""Rotary position tables, and the ways in which checkpoints stretch them to longer contexts.

Frequencies are made in float32 throughout, as checkpoints were trained with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def frequencies(rotary_dim: int, base: float) -> Tensor:
    """Angle per position of each pair of elements, ``[rotary_dim / 2]`` (Su et al. 2021, arXiv:2104.09864)."""
    return 1.0 / (base ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim))


def banded_frequencies(
    rotary_dim: int, base: float, *, factor: float, low: float, high: float, original_positions: int
) -> Tensor:
    """Divide low frequencies by ``factor``, keep high ones, and blend between.

    Args:
        low, high: turns within ``original_positions`` below which a frequency is low, and above which it is high.
        original_positions: context of the pre-training.
    """
    plain = frequencies(rotary_dim, base)
    turns = original_positions * plain / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * plain / factor + keep * plain


def yarn_frequencies(
    rotary_dim: int,
    base: float,
    *,
    factor: float,
    original_positions: int,
    fast: float = 32,
    slow: float = 1,
    truncate: bool = True,
) -> Tensor:
    """Keep pairs that turn often, divide those that turn rarely by ``factor``, ramp between.

    This is YaRN (Peng et al. 2023, arXiv:2309.00071).

    Args:
        fast, slow: turns within ``original_positions`` at the two ends of the ramp.
        original_positions: context of the pre-training.
        truncate: widen the ramp to whole pairs.
    """
    first, last = (_pair_of_turns(turns, rotary_dim, base, original_positions) for turns in (fast, slow))
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    width = (last - first) or 0.001
    stretch = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    plain = frequencies(rotary_dim, base)
    return plain / factor * stretch + plain * (1 - stretch)


def _pair_of_turns(turns: float, rotary_dim: int, base: float, positions: int) -> float:
    """Index of the pair that makes this many turns over ``positions``."""
    return rotary_dim * math.log(positions / (turns * 2 * math.pi)) / (2 * math.log(base))


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """Factor on cosines and sines that keeps attention as sharp as before the stretch."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotary_table(frequencies_K: Tensor, positions: int, device: torch.device, magnitude: float = 1.0) -> Tensor:
    """Float32 ``[positions, rotary_dim]``: cosines in the first half, sines in the second."""
    angles_PK = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies_K)
    return (torch.cat([angles_PK.cos(), angles_PK.sin()], dim=-1) * magnitude).to(device)
