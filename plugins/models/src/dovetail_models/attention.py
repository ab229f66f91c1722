"""Attention shapes as checkpoints describe them."""

from __future__ import annotations

from dovetail.contracts.attention import AttentionSpec
from dovetail.errors import ConfigError
from dovetail_models.fields import Fields


def read_attention(
    fields: Fields,
    *,
    head_dim: int | None = None,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> AttentionSpec:
    """Heads of a config.json.

    Args:
        head_dim: the family's default, if it is not hidden size / heads.
        window, soft_cap: of the layer.
        scale: factor on the scores, if it is not the root of 1 / head size.

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
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=size,
        scale=size**-0.5 if scale is None else scale,
        window=window,
        soft_cap=soft_cap,
    )


def read_alternating_windows(fields: Fields, *, every: int) -> list[int | None]:
    """The window of each layer, for families of which every ``every``-th layer sees everything and the others slide.

    Raises:
        ConfigError: ``layer_types`` does not fit the layers, or there are sliding layers and no window.
    """
    layers = fields.integer("num_hidden_layers")
    window = fields.integer_or_null("sliding_window", 4096)
    windows = _typed_windows(fields, layers, window, "sliding_window is null")
    if windows is None:
        windows = [window if (layer + 1) % every else None for layer in range(layers)]
        if window is None and every > 1:
            raise fields.bad("sliding_window", "a positive integer, as layers slide")
    return windows


def read_late_windows(fields: Fields) -> list[int | None]:
    """The window of each layer, for families whose first ``max_window_layers`` layers see everything.

    Raises:
        ConfigError: ``layer_types`` does not fit the layers, or names sliding layers without a window.
    """
    layers = fields.integer("num_hidden_layers")
    window = fields.integer("sliding_window", 4096) if fields.switch("use_sliding_window", False) else None
    windows = _typed_windows(fields, layers, window, "use_sliding_window is false")
    if windows is None:
        full = 0 if fields.raw("max_window_layers") == 0 else fields.integer("max_window_layers", 28)
        windows = [window if layer >= full else None for layer in range(layers)]
    return windows


def _typed_windows(fields: Fields, layers: int, window: int | None, unset: str) -> list[int | None] | None:
    """The windows that ``layer_types`` gives, if it is there; ``unset`` says why there may be no ``window``."""
    types = fields.raw("layer_types")
    if types is None:
        return None
    known = {"full_attention": None, "sliding_attention": window}
    if not isinstance(types, list) or len(types) != layers or not set(types) <= set(known):
        raise fields.bad("layer_types", f"a list of {layers} times {' or '.join(known)}")
    if "sliding_attention" in types and window is None:
        raise ConfigError(f"'layer_types' in config.json names sliding_attention, but {unset}.")
    return [known[kind] for kind in types]
