"""Gated activations for the op table. Several devices have the gates of their own features beside what they gate, so
each must split its own part in two; on one device the reference does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from torch import Tensor

from dovetail.contracts.ops import PackedWeight
from dovetail.ops import reference
from dovetail_tpu import bridges
from dovetail_tpu.mesh import over_features, over_outputs


def silu_and_mul(x_T2F: Tensor) -> Tensor:
    """See the reference."""
    return _gated(x_T2F, "silu") if _are_several() else reference.silu_and_mul(x_T2F)


def gelu_tanh_and_mul(x_T2F: Tensor) -> Tensor:
    """See the reference."""
    return _gated(x_T2F, "gelu_tanh") if _are_several() else reference.gelu_tanh_and_mul(x_T2F)


def linear_silu_and_mul(x_TI: Tensor, packed: PackedWeight, bias_O: Tensor | None = None) -> Tensor:
    """See the reference."""
    if not _are_several():
        return reference.linear_silu_and_mul(x_TI, packed, bias_O)
    weights = (packed,) if bias_O is None else (packed, bias_O)
    (out_TF,) = bridges.current().apply(_linear_silu_and_mul, x_TI, *weights)
    return out_TF


def _are_several() -> bool:
    return bridges.current().num_devices > 1


def _gated(x_T2F: Tensor, activation: str) -> Tensor:
    (out_TF,) = bridges.current().apply(_over_features, x_T2F, activation=activation)
    return out_TF


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


def _gate(x_T2F: Array, activation: str) -> Array:
    gate_TF, up_TF = jnp.split(x_T2F.astype(jnp.float32), 2, axis=-1)
    return (_ACTIVATIONS[activation](gate_TF) * up_TF).astype(x_T2F.dtype)


def _over_features(x_T2F: Array, *, activation: str) -> tuple[Array]:
    return (over_features(partial(_gate, activation=activation))(x_T2F),)


def _linear_silu_and_mul(*arrays: Array) -> tuple[Array]:
    return (over_outputs(_gated_product)(*arrays),)


def _gated_product(x_TI: Array, weight_OI: Array, bias_O: Array | None = None) -> Array:
    precision = lax.Precision.HIGHEST if x_TI.dtype == jnp.float32 else lax.Precision.DEFAULT
    contract = (((1,), (1,)), ((), ()))
    out_TO = lax.dot_general(x_TI, weight_OI, contract, precision=precision, preferred_element_type=jnp.float32)
    out_TO = out_TO if bias_O is None else out_TO + bias_O.astype(jnp.float32)
    return _gate(out_TO, "silu").astype(x_TI.dtype)
