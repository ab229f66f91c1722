"""The mesh: how a model and its cache lie on several chips, which compute every step together.

Weights of a layer that reads what all chips have are split by outputs, those of the layer after it by inputs, whose
products are summed over chips (Shoeybi et al. 2019, arXiv:1909.08053). XLA derives the rest from where the weights lie.
It cannot look into kernels: these run on each chip's own heads, by a ``shard_map`` over the mesh that is set while a
step is traced (``jax.sharding.use_abstract_mesh``). Without one there is one chip, and kernels are called as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from enum import Enum
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from jax.sharding import AxisType, Mesh, PartitionSpec
from torch import Tensor, nn

from dovetail.contracts.attention import AttentionSpec
from dovetail.errors import ConfigError
from dovetail.layers.attention import SelfAttention
from dovetail.layers.block import Block
from dovetail.layers.experts import Experts
from dovetail.layers.mlp import GatedMLP
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


def spec_of(path: str, shape: Sequence[int], devices: int) -> Spec:
    """How a tensor of a model lies on so many devices.

    Matrices are ``[O, I]``, experts' ``[E, O, I]``. Others, and what does not divide, every device has whole.

    Args:
        path: dotted names of the modules around the tensor, and its own.
    """
    dim = {Split.OUTPUTS: -2, Split.INPUTS: -1}.get(split_of(path))
    if devices == 1 or dim is None or len(shape) not in (2, 3) or shape[dim] % devices:
        return ()
    axes: list[str | None] = [None] * len(shape)
    axes[dim] = AXIS
    return tuple(axes)


class Placement:
    """Where the tensors of a model, or of tables, go on so many devices.

    Outputs of merged layers are put in an order in which each device has all of what belongs together: queries, keys
    and values of its heads; gate and up of its inner features. Where there are fewer key/value heads than devices,
    several have the same one. What reads the outputs goes by this order: attention's projection,
    :func:`over_features`, :func:`over_inner`.

    Raises:
        ConfigError: a layer's heads or inner features do not divide evenly.
    """

    def __init__(self, model: nn.Module | None, devices: int) -> None:
        self._devices = devices
        self._orders: dict[str, Tensor] = {}
        for path, module in model.named_modules() if model is not None and devices > 1 else ():
            if isinstance(module, SelfAttention):
                check_heads(devices, [module.spec])
                pieces = [module.spec.num_heads, module.spec.num_kv_heads, module.spec.num_kv_heads]
                self._orders[f"{path}.qkv_proj"] = _order(module.qkv_proj.outputs.values(), pieces, devices)
            elif isinstance(module, GatedMLP):
                self._orders[f"{path}.gate_up_proj"] = _paired(module.gate_up_proj, devices)
            elif isinstance(module, Experts):
                self._orders[f"{path}.gate_up"] = _paired(module.gate_up, devices)

    def of(self, path: str, host: Tensor) -> tuple[Tensor, Spec]:
        """What the devices are to have of a tensor, and how it is split among them.

        Args:
            path: dotted names of the modules around the tensor, and its own.
        """
        order = next((order for layer, order in self._orders.items() if path.startswith(f"{layer}.")), None)
        if order is not None:
            outputs = int(order.max()) + 1
            dims = [dim for dim in (host.ndim - 2, host.ndim - 1) if dim >= 0 and host.shape[dim] == outputs]
            if dims:
                host = host.index_select(dims[0], order.to(host.device))
        return host, spec_of(path, host.shape, self._devices)


def _paired(gate_up: Block, devices: int) -> Tensor:
    gate, up = [*gate_up.outputs.values()][:2]
    if gate % devices:
        raise ConfigError(f"{gate} inner features do not divide evenly among {devices} devices. Take fewer chips.")
    return _order([gate, up], [devices] * 2, devices)


def _order(sizes: Collection[int], pieces: Sequence[int], devices: int) -> Tensor:
    """Of each device in turn, its share of each part. A part of few pieces is given out more than once."""
    starts = itertools.accumulate(sizes, initial=0)
    ranges = []
    for start, size, count in zip(starts, sizes, pieces, strict=False):
        shares = min(devices, count)
        ranges.append(torch.arange(start, start + size).view(shares, -1).repeat_interleave(devices // shares, dim=0))
    return torch.cat(ranges, dim=1).flatten()


def kv_shape(devices: int, places: int, kv_heads: int, size: int, itemsize: int) -> tuple[int, int, int]:
    """Shape of a layer's cache on so many devices: side by side, what each has for its own heads."""
    places, rows, padded = cache_shape(places, max(1, kv_heads // devices), size, itemsize)
    return places, rows * devices, padded


def check_heads(devices: int, specs: Sequence[AttentionSpec]) -> None:
    """Each device has whole heads, and with them the key/value heads that they read.

    Raises:
        ConfigError: they do not divide evenly; names the numbers of chips that would do.
    """
    wrong = [spec for spec in specs if not _divides(devices, spec)]
    if wrong:
        heads, kv_heads = wrong[0].num_heads, wrong[0].num_kv_heads
        good = [n for n in range(1, heads + 1) if all(_divides(n, spec) for spec in specs)]
        raise ConfigError(
            f"{heads} query heads and {kv_heads} key/value heads do not divide evenly among {devices} devices. "
            f"Take as many chips as make {', '.join(map(str, good))} devices."
        )


def _divides(devices: int, spec: AttentionSpec) -> bool:
    kv_heads = spec.num_kv_heads
    return spec.num_heads % devices == 0 and (kv_heads % devices == 0 or devices % kv_heads == 0)


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
    """``gate(x_TF2) -> [T, F]`` on each device's features of a projection in the order of a :class:`Placement`."""
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
    Those of gate and up are in the order of a :class:`Placement`.
    """

    def part(*arrays: Array) -> Array:
        return experts(*arrays) if devices_of_step() == 1 else jax.lax.psum(experts(*arrays), AXIS)

    split = PartitionSpec(None, AXIS, None), PartitionSpec(None, None, AXIS)
    return _spread(part, (WHOLE, *split, WHOLE, WHOLE), WHOLE)


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
