"""How much memory a configuration takes, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from dovetail.config import EngineConfig
from dovetail.contracts.attention import AttentionSpec
from dovetail.contracts.executor import KVGroup
from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import Platform
from dovetail.runner.draft_memory import draft_groups
from dovetail.runner.kv_memory import blocks_per_request, groups_of
from dovetail.runner.load import load_selection, platform_config
from dovetail.runner.loaded_model import unfilled
from dovetail.runner.loader import weight_bytes, weight_files
from dovetail.runner.tensor_file import TensorFile


class Need(NamedTuple):
    """Bytes, a draft model's included.

    Attributes:
        weights: in the activation dtype, or as stored if that is smaller.
        one_request: KV cache of the longest request.
        available: on the device now.
    """

    weights: int
    one_request: int
    available: int


def needed(config: EngineConfig, folder: Path) -> Need:
    """An estimate: activations, and what a number format saves while loading, are not counted.

    Raises:
        DovetailError: weights or platform cannot be read.
    """
    platform: Platform = load_selection(config.platform)(platform_config(config))
    specs = _attention(config)
    weights = _weights(config, folder)
    one_request = _one_request(config, specs, groups_of(specs))
    if config.draft is not None:
        specs = _attention(config.draft)
        weights += _weights(config.draft, Path(config.draft.model_path))
        one_request += _one_request(config.draft, specs, draft_groups(specs))
    return Need(weights=weights, one_request=one_request, available=platform.memory().available)


def _attention(config: EngineConfig) -> Sequence[AttentionSpec]:
    specs: Sequence[AttentionSpec] = load_selection(config.model).facts(config.hf_config).attention
    return specs


def _one_request(config: EngineConfig, specs: Sequence[AttentionSpec], groups: Sequence[KVGroup]) -> int:
    """Of each group the pages that its window shows; all pages have the size of the largest group's."""
    dtype: torch.dtype = getattr(torch, config.kv_dtype)
    sizes = [2 * spec.num_kv_heads * spec.head_size * dtype.itemsize for spec in specs]
    per_token = max(sum(sizes[layer] for layer in group.layers) for group in groups)
    return blocks_per_request(config, groups) * config.block_size * per_token


def _weights(config: EngineConfig, folder: Path) -> int:
    if config.load_format == "dummy":
        return weight_bytes(unfilled(config, OpTable(), torch.device("cpu")))
    dtype: torch.dtype = getattr(torch, config.dtype)
    tensors = [tensor for file in weight_files(folder) for tensor in TensorFile(file).tensors]
    return sum(
        tensor.nbytes // tensor.dtype.itemsize * (dtype.itemsize if tensor.dtype.itemsize > 1 else 1)
        for tensor in tensors
    )
