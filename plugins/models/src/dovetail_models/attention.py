"""Attention shapes as checkpoints describe them."""

from __future__ import annotations

from dovetail.contracts.attention import AttentionSpec
from dovetail.errors import ConfigError
from dovetail_models.fields import Fields


def read_attention(fields: Fields, *, head_dim: int | None = None, window: int | None = None) -> AttentionSpec:
    """Heads of a config.json; ``head_dim`` is the family's default, if it is not hidden size / heads.

    Raises:
        ConfigError: head counts that do not divide.
    """
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.bad("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    if head_dim is None and fields.raw("head_dim") is None and fields.integer("hidden_size") % heads:
        raise fields.bad("hidden_size", f"a multiple of num_attention_heads, {heads}, as there is no 'head_dim'")
    size = fields.integer("head_dim", head_dim or fields.integer("hidden_size") // heads)
    return AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_size=size, scale=size**-0.5, window=window)


def read_windows(fields: Fields) -> list[int | None]:
    """The window of each layer, for families whose first ``max_window_layers`` layers see everything.

    Raises:
        ConfigError: ``layer_types`` does not fit the layers, or names sliding layers without a window.
    """
    layers = fields.integer("num_hidden_layers")
    window = fields.integer("sliding_window", 4096) if fields.switch("use_sliding_window", False) else None
    types = fields.raw("layer_types")
    if types is None:
        full = 0 if fields.raw("max_window_layers") == 0 else fields.integer("max_window_layers", 28)
        return [window if layer >= full else None for layer in range(layers)]
    known = {"full_attention": None, "sliding_attention": window}
    if not isinstance(types, list) or len(types) != layers or not set(types) <= set(known):
        raise fields.bad("layer_types", f"a list of {layers} times {' or '.join(known)}")
    if "sliding_attention" in types and window is None:
        raise ConfigError("'layer_types' in config.json names sliding_attention, but use_sliding_window is false.")
    return [known[kind] for kind in types]
