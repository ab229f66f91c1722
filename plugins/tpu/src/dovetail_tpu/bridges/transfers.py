"""Copies between torch's tensors on the host and JAX's arrays, for every dtype that both have."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from torch import Tensor

_BITS = MappingProxyType({torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.int8, torch.float8_e5m2: torch.int8})
"""Integers of the same size for what NumPy lacks."""
JAX_DTYPES = MappingProxyType(
    {
        torch.bfloat16: jnp.dtype(jnp.bfloat16),
        torch.float8_e4m3fn: jnp.dtype(jnp.float8_e4m3fn),
        torch.float8_e5m2: jnp.dtype(jnp.float8_e5m2),
    }
)
_TORCH_DTYPES = {theirs: ours for ours, theirs in JAX_DTYPES.items()}


def jax_dtype(dtype: torch.dtype) -> Any:
    """JAX's name of a dtype."""
    return JAX_DTYPES.get(dtype) or jnp.dtype(str(dtype).removeprefix("torch."))


def numpy_of(host: Tensor) -> np.ndarray:
    """The same memory as NumPy sees it."""
    host = host.detach()
    bits = _BITS.get(host.dtype)
    if bits is None:
        return host.numpy()
    return host.view(bits).numpy().view(JAX_DTYPES[host.dtype])


def array_of(host: Tensor, sharding: Any = None) -> Array:
    """A copy on the chip, which does not follow later changes of the tensor."""
    values = numpy_of(host.contiguous())
    on_host = jax.default_backend() == "cpu"  # JAX would keep using the tensor's own memory there
    return jax.device_put(values.copy() if on_host else values, sharding)


def tensor_of(array: Array) -> Tensor:
    """A copy on the host."""
    values = np.array(array)
    dtype = _TORCH_DTYPES.get(values.dtype)
    if dtype is None:
        return torch.from_numpy(values)
    return torch.from_numpy(values.view(f"i{values.dtype.itemsize}")).view(dtype)
