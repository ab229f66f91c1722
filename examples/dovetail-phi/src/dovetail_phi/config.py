"""What config.json of a Phi checkpoint says, or a refusal that names the field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dovetail.contracts.attention import AttentionSpec
from dovetail.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FIXED = {"hidden_act": "gelu_new", "qk_layernorm": False, "tie_word_embeddings": False}
"""Fields that change the mathematics, with the values of every published checkpoint, which are served."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhiConfig:
    """The sizes of one checkpoint, by the names of this package."""

    vocab_size: int
    hidden_size: int
    inner_size: int
    num_layers: int
    attention: AttentionSpec
    rotary_dim: int
    rope_theta: float
    norm_eps: float
    max_positions: int
    dtype: torch.dtype

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> PhiConfig:
        """Read config.json as transformers does, with its defaults.

        Raises:
            ConfigError: a field is missing, or has a value that cannot be honoured.
        """
        for name, served in FIXED.items():
            if _get(config, name, served) != served:
                raise _bad(name, config[name], repr(served))
        hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
        if hidden % heads:
            raise _bad("num_attention_heads", heads, f"a divisor of hidden_size, which is {hidden}")
        kv_heads = _size(config, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise _bad("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads, which is {heads}")
        rotary_dim, theta = _rotary(config, hidden // heads)
        return cls(
            vocab_size=_size(config, "vocab_size"),
            hidden_size=hidden,
            inner_size=_size(config, "intermediate_size"),
            num_layers=_size(config, "num_hidden_layers"),
            attention=AttentionSpec(
                num_heads=heads, num_kv_heads=kv_heads, head_size=hidden // heads, scale=(hidden // heads) ** -0.5
            ),
            rotary_dim=rotary_dim,
            rope_theta=theta,
            norm_eps=_number(config, "layer_norm_eps", 1e-5),
            max_positions=_size(config, "max_position_embeddings", 2048),
            dtype=_dtype(config),
        )


def _rotary(config: Mapping[str, Any], head_size: int) -> tuple[int, float]:
    """Elements of a head that turn, and the base; older files have both at the top level."""
    rope = _get(config, "rope_parameters", _get(config, "rope_scaling", {}))
    if not isinstance(rope, Mapping):
        raise _bad("rope_parameters" if config.get("rope_parameters") else "rope_scaling", rope, "an object")
    if _get(rope, "rope_type", "default") != "default":
        raise _bad("rope_type", rope["rope_type"], "'default'")
    factor = _number({**config, **rope}, "partial_rotary_factor", 0.5)
    rotary_dim = int(head_size * factor)
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_size:
        raise _bad("partial_rotary_factor", factor, f"such that an even part of {head_size} elements turns")
    return rotary_dim, _number({**config, **rope}, "rope_theta", 10000.0)


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    name = "torch_dtype" if config.get("dtype") is None else "dtype"
    value = _get(config, name, "float32")
    if not isinstance(value, str) or value not in DTYPES:
        raise _bad(name, value, f"one of {', '.join(DTYPES)}")
    return DTYPES[value]


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = _get(config, name, default)
    if value is None:
        raise ConfigError(f"config.json has no {name!r}; the checkpoint is incomplete.")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _bad(name, value, "a positive integer")
    return value


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    value = _get(config, name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise _bad(name, value, "a positive number")
    return float(value)


def _get(config: Mapping[str, Any], name: str, default: Any) -> Any:
    value = config.get(name)
    return default if value is None else value


def _bad(name: str, value: Any, wanted: str) -> ConfigError:
    return ConfigError(f"{name!r} in config.json is {value!r}; it must be {wanted}.")
