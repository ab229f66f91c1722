"""Small configurations and logits of the architectures that transformers knows. Imports it when asked, not before."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SMALL: Mapping[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
"""Sizes to give to the fields that a configuration sets. Six layers: families alternate kinds of layers."""
NO_TOKENS: Mapping[str, None] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""Special tokens would lie beyond the small vocabulary."""


def small_config(architecture: str, changes: Mapping[str, Any]) -> dict[str, Any] | None:
    """config.json of a small model; None if transformers is missing or does not know the architecture.

    Args:
        changes: fields that should differ.
    """
    model = _model_class(architecture)
    if model is None:
        return None
    usual = model.config_class().to_dict()
    sizes = {name: size for name, size in SMALL.items() if usual.get(name) is not None}
    config = model.config_class(**{**sizes, **NO_TOKENS, **changes}, architectures=[architecture])
    made: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    # What is left out gets transformers' default again: special tokens beyond the vocabulary, for one.
    kept = {*NO_TOKENS, *changes}
    return {name: value for name, value in made.items() if value is not None or name in kept}


def known_logits(folder: Path, token_ids: Sequence[int]) -> Tensor | None:
    """Float32 logits ``[T, V]`` of a checkpoint; None if transformers is missing or does not know its architecture."""
    model = _loaded(folder)
    if model is None:
        return None
    with torch.inference_mode():
        logits_TV: Tensor = model(torch.tensor([list(token_ids)])).logits[0]
    return logits_TV


@lru_cache(maxsize=1)
def _loaded(folder: Path) -> Any:
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = _model_class(architecture)
    if model is None:
        return None
    return model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def why_unknown(architecture: str) -> str:
    """Why transformers does not help with an architecture."""
    if find_spec("transformers") is None:
        return "transformers is not installed: pip install 'dovetail-core[transformers]'"
    return f"transformers does not know {architecture}"


def _model_class(architecture: str) -> Any:
    if find_spec("transformers") is None:
        return None
    import transformers

    return getattr(transformers, architecture, None)
