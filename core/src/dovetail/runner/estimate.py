"""How much memory a configuration takes, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from dovetail.config import EngineConfig
from dovetail.contracts.model import ModelFacts
from dovetail.contracts.platform import Platform, PlatformConfig
from dovetail.runner.load import load_selection
from dovetail.runner.loader import weight_files
from dovetail.runner.tensor_file import TensorFile


class Need(NamedTuple):
    """Bytes.

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
    platform: Platform = load_selection(config.platform)(PlatformConfig(num_threads=config.num_threads))
    facts: ModelFacts = load_selection(config.model).facts(config.hf_config)
    per_token = sum(2 * spec.num_kv_heads * spec.head_size for spec in facts.attention)
    return Need(
        weights=_weights(folder, getattr(torch, config.dtype)),
        one_request=per_token * config.max_model_len * getattr(torch, config.kv_dtype).itemsize,
        available=platform.memory().available,
    )


def _weights(folder: Path, dtype: torch.dtype) -> int:
    tensors = [tensor for file in weight_files(folder) for tensor in TensorFile(file).tensors]
    return sum(
        tensor.nbytes // tensor.dtype.itemsize * (dtype.itemsize if tensor.dtype.itemsize > 1 else 1)
        for tensor in tensors
    )
