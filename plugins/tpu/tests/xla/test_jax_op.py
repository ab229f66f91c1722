"""Functions of JAX as operations of torch_xla, compared with NumPy."""

import jax
import jax.numpy as jnp
import pytest
import torch
from jax.experimental import pallas as pl

from dovetail.errors import ConfigError


def gathered(table_VD, ids_T, *, times):
    return table_VD[ids_T] * times, jnp.max(ids_T)


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_functions_of_jax(bridge, dtype, ids):
    """The same at once and as part of a program, with tables of both widths."""
    table_VD, ids_T = torch.arange(12).reshape(4, 3).to(dtype), torch.tensor([3, 0, 3], dtype=ids)
    at_once = bridge.apply(gathered, table_VD, ids_T, times=2)
    adopted = bridge.adopt(table_VD)
    program = bridge.trace(lambda packed_W: bridge.apply(gathered, adopted, packed_W.to(ids), times=2), 3)
    inside = bridge.to_host(bridge.call(program, ids_T.int()))
    for rows_TD, largest in (at_once, inside):
        assert rows_TD.dtype == dtype
        assert rows_TD.tolist() == [[18, 20, 22], [0, 2, 4], [18, 20, 22]]
        assert largest.dtype == ids
        assert largest.item() == 3


def for_chips(x_N):
    """A kernel that the host's compiler refuses."""
    return (pl.pallas_call(copied, out_shape=jax.ShapeDtypeStruct(x_N.shape, x_N.dtype))(x_N),)


def copied(x_ref, out_ref):
    out_ref[...] = x_ref[...]


def test_a_kernel_that_does_not_compile_is_refused_with_a_remedy(bridge):
    with pytest.raises(
        ConfigError, match=r"The program of for_chips does not compile for cpu: report it.*interpret mode"
    ):
        bridge.trace(lambda packed_W: bridge.apply(for_chips, packed_W), 3)


def test_a_cache_that_does_not_fit_is_refused_with_a_remedy(bridge):
    """By the host's allocator, which has no petabyte."""
    with pytest.raises(
        ConfigError, match=r"The KV cache does not fit into the memory of cpu.*kv-cache-memory.*allocating"
    ):
        bridge.allocate((1 << 48,), torch.float32)
    assert bridge.allocate((2,), torch.float32).tensor.cpu().tolist() == [0, 0]


def test_wide_integers_stay_wide(bridge):
    """Keys of the noise that samples have 64 bits."""
    key = torch.tensor([2**62 + 1, -(2**63)])
    rotated, *_ = bridge.apply(lambda key_S: (key_S >> 7,), key)
    assert rotated.tolist() == (key >> 7).tolist()


def test_states_change_outside_of_programs(bridge):
    state = bridge.allocate((4,), torch.float32)
    for times in (1, 2):
        (total,) = bridge.apply(lambda x_N, y_N: (x_N + y_N, jnp.sum(y_N)), torch.arange(4.0), states=[state])
        assert state.tensor.cpu().tolist() == [0, times, 2 * times, 3 * times]
        assert total.item() == 6
