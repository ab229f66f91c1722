"""The mesh: how a model and its cache lie on several chips, which compute every step together.

Weights of a layer that reads what all chips have are split by outputs, those of the layer after it by inputs, whose
products are summed over chips (Shoeybi et al. 2019, arXiv:1909.08053). XLA derives the rest from where the weights lie.
It cannot look into kernels: these run on each chip's own heads, by a ``shard_map`` over the mesh that is set while a
step is traced (``jax.sharding.use_abstract_mesh``). Without one there is one chip, and kernels are called as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, PartitionSpec

from dovetail_tpu.bridges.protocol import Spec
from dovetail_tpu.kernels.kv_write import cache_shape

AXIS = "tp"
KV_SPEC: Spec = (None, AXIS, None)
"""Of a layer's cache, :func:`kv_shape`."""
WHOLE = PartitionSpec()
HEADS = PartitionSpec(None, AXIS, None)
"""Of ``[T, H, K]``, and of a cache ``[X, rows, Kp]``."""
FEATURES = PartitionSpec(None, AXIS)


class Split(Enum):
    """Along what a layer's weights are split."""

    OUTPUTS = "outputs"
    INPUTS = "inputs"
    WHOLE = "whole"


LETTERS = MappingProxyType({Split.OUTPUTS: "O", Split.INPUTS: "IG", Split.WHOLE: ""})
"""Of the dimensions that are split."""
SPLITS = MappingProxyType(
    {
        "qkv_proj": Split.OUTPUTS,
        "gate_up_proj": Split.OUTPUTS,
        "lm_head": Split.OUTPUTS,
        "gate_up": Split.OUTPUTS,
        "o_proj": Split.INPUTS,
        "down_proj": Split.INPUTS,
        "down": Split.INPUTS,
        "embed_tokens": Split.OUTPUTS,
    }
)
"""By the name of a layer within its module."""


def tp_mesh(devices: Sequence[Any]) -> Mesh:
    """All of these devices, along one axis."""
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def split_of(path: str) -> Split:
    """Of a tensor, by the dotted names of the modules around it."""
    return next((SPLITS[name] for name in reversed(path.split(".")) if name in SPLITS), Split.WHOLE)


def kv_shape(devices: int, places: int, kv_heads: int, size: int, itemsize: int) -> tuple[int, int, int]:
    """Shape of a layer's cache on so many devices: side by side, what each has for its own heads."""
    places, rows, padded = cache_shape(places, max(1, kv_heads // devices), size, itemsize)
    return places, rows * devices, padded


def devices_of_step() -> int:
    """Of the mesh that the step being traced runs on."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def over_heads(attend: Callable[..., tuple[Array, Array]]) -> Callable[..., tuple[Array, Array]]:
    """``attend(q_THK, k_TNK, v_TNK, kv_X2NK, *tables)``, which returns ``(out_THK, kv_X2NK)``, on each device's heads.

    Where there are fewer key/value heads than devices, several have the same one.
    """
    spread = _spread(attend, (HEADS,) * 4, (HEADS, HEADS))

    def run(q_THK: Array, k_TNK: Array, v_TNK: Array, kv_X2NK: Array, *tables: Array) -> tuple[Array, Array]:
        copies = max(1, devices_of_step() // k_TNK.shape[1])
        k_TNK, v_TNK = (jnp.repeat(x_TNK, copies, axis=1) for x_TNK in (k_TNK, v_TNK))
        out_THK, kv_X2NK = spread(q_THK, k_TNK, v_TNK, kv_X2NK, *tables)
        return out_THK, kv_X2NK

    return run


def over_features(gate: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """``gate(x_TF2) -> [T, F]`` on each device's features of a projection, in the order of a
    :class:`~dovetail_tpu.placement.Placement`.
    """
    return _spread(gate, (FEATURES,), FEATURES)


def over_outputs(linear: Callable[..., Array]) -> Callable[..., Array]:
    """``linear(x_TI, weight_OI, *more_O) -> [T, O]`` on each device's outputs; it may gate them, too."""

    def run(x_TI: Array, *weights: Array) -> Array:
        specs = tuple(PartitionSpec(AXIS, *(None,) * (weight.ndim - 1)) for weight in weights)
        out_TO: Array = _spread(linear, (WHOLE, *specs), FEATURES)(x_TI, *weights)
        return out_TO

    return run


def over_inputs(linear: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """``linear(x_TI, weight_OI) -> [T, O]`` on each device's inputs, summed."""

    def part(x_TI: Array, weight_OI: Array) -> Array:
        out_TO = linear(x_TI, weight_OI)
        return out_TO if devices_of_step() == 1 else jax.lax.psum(out_TO, AXIS)

    return _spread(part, (FEATURES, FEATURES), WHOLE)


def over_inner(experts: Callable[..., Array]) -> Callable[..., Array]:
    """``experts(x_TD, gate_up_EFD, down_EDF, ids_TA, weights_TA) -> [T, D]`` on each device's inner features, summed.
    Those of gate and up are in the order of a :class:`~dovetail_tpu.placement.Placement`.
    """

    def part(*arrays: Array) -> Array:
        return experts(*arrays) if devices_of_step() == 1 else jax.lax.psum(experts(*arrays), AXIS)

    split = PartitionSpec(None, AXIS, None), PartitionSpec(None, None, AXIS)
    return _spread(part, (WHOLE, *split, WHOLE, WHOLE), WHOLE)


def over_product(
    product: Callable[..., tuple[Array, ...]], split: Split, dims: Sequence[str]
) -> Callable[..., tuple[Array, ...]]:
    """``product(*operands) -> ([T, O],)`` with a weight that is split: on each device's outputs, or on its inputs, and
    summed; or on every device alike.

    Args:
        dims: of each operand, letters for its last dimensions. Outputs are ``O``; inputs ``I``, and groups of them
            ``G``. A dimension of one element belongs to all.
    """
    letters = LETTERS[split]

    def part(*operands: Array) -> tuple[Array, ...]:
        results = product(*operands)
        is_part = split is Split.INPUTS and devices_of_step() > 1
        return tuple(jax.lax.psum(result, AXIS) for result in results) if is_part else results

    def run(*operands: Array) -> tuple[Array, ...]:
        specs = tuple(_lettered(x.shape, names, letters) for x, names in zip(operands, dims, strict=True))
        results: tuple[Array, ...] = _spread(part, specs, FEATURES if split is Split.OUTPUTS else WHOLE)(*operands)
        return results

    return run


def _lettered(shape: Sequence[int], names: str, letters: str) -> PartitionSpec:
    named = zip(shape, names.rjust(len(shape)), strict=True)
    return PartitionSpec(*(AXIS if size > 1 and name in letters else None for size, name in named))


def look_up(token_ids_T: Array, table_VD: Array) -> Array:
    """Rows ``[T, D]`` of a table, of which each device has some; or all, if they do not divide."""
    if table_VD.shape[0] % devices_of_step():
        return table_VD[token_ids_T]

    def part(token_ids_T: Array, table_UD: Array) -> Array:
        own_T = token_ids_T - jax.lax.axis_index(AXIS) * len(table_UD)
        is_own_T = (own_T >= 0) & (own_T < len(table_UD))
        rows_TD = jnp.where(is_own_T[:, None], table_UD[jnp.where(is_own_T, own_T, 0)], 0)
        return jax.lax.psum(rows_TD, AXIS)

    rows_TD: Array = _spread(part, (WHOLE, PartitionSpec(AXIS, None)), WHOLE)(token_ids_T, table_VD)
    return rows_TD


def whole(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel on every device alike, with whole operands."""
    return _spread(kernel, (), WHOLE)


def _spread(part: Callable[..., Any], specs: tuple[PartitionSpec, ...], out_specs: Any) -> Callable[..., Any]:
    """A function of each device's parts, called with whole arrays; those that have no spec every device has whole."""
    if devices_of_step() == 1:
        return part

    def run(*arrays: Array) -> Any:
        in_specs = specs + (WHOLE,) * (len(arrays) - len(specs))
        return jax.shard_map(part, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)

    return run
