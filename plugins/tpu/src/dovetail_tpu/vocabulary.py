"""Embedding for the op table: several devices have some of the vocabulary each."""

from __future__ import annotations

from jax import Array
from torch import Tensor

from dovetail.ops import reference
from dovetail_tpu import bridges, mesh


def embedding(ids_T: Tensor, table_VD: Tensor) -> Tensor:
    """See the reference."""
    bridge = bridges.current()
    if bridge.num_devices == 1:
        return reference.embedding(ids_T, table_VD)
    (rows_TD,) = bridge.apply(_rows, ids_T, table_VD)
    return rows_TD


def _rows(ids_T: Array, table_VD: Array) -> tuple[Array]:
    return (mesh.look_up(ids_T, table_VD),)
