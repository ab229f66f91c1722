"""Products of plain weights for the op table: several devices have some outputs, or some inputs, each."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from torch import Tensor

from dovetail.contracts.ops import PackedWeight
from dovetail.ops import reference
from dovetail_tpu import bridges
from dovetail_tpu.bridges.protocol import Spec
from dovetail_tpu.mesh import AXIS, over_inputs, over_outputs


def linear(x_TI: Tensor, packed: PackedWeight, bias_O: Tensor | None = None) -> Tensor:
    """See the reference. The compiler would gather a weight whole where it is told that the result is to be whole."""
    bridge = bridges.current()
    spec = bridge.spec_of(packed) if bridge.num_devices > 1 else ()
    if AXIS not in spec:
        return reference.linear(x_TI, packed, bias_O)
    tensors = (x_TI, packed) if bias_O is None else (x_TI, packed, bias_O)
    (out_TO,) = bridge.apply(_linear, *tensors, spec=spec)
    return out_TO


def _linear(x_TI: Array, weight_OI: Array, bias_O: Array | None = None, *, spec: Spec) -> tuple[Array]:
    spread = over_outputs if spec[0] == AXIS else over_inputs
    out_TO = spread(product)(x_TI, weight_OI)
    return (out_TO if bias_O is None else out_TO + bias_O,)


def product(x_TI: Array, weight_OI: Array) -> Array:
    """``x @ weightᵀ``, summed in float32."""
    precision = lax.Precision.HIGHEST if x_TI.dtype == jnp.float32 else lax.Precision.DEFAULT
    contract = (((1,), (1,)), ((), ()))
    out_TO = lax.dot_general(x_TI, weight_OI, contract, precision=precision, preferred_element_type=jnp.float32)
    return out_TO.astype(x_TI.dtype)
