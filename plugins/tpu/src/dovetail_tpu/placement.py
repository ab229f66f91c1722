"""Where the tensors of a model lie on a mesh: which dimension of each is split, and in what order its outputs are."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.contracts.attention import AttentionSpec
from dovetail.errors import ConfigError
from dovetail.layers.attention import SelfAttention
from dovetail.layers.block import Block
from dovetail.layers.experts import Experts
from dovetail.layers.mlp import GatedMLP
from dovetail_tpu.bridges.protocol import Spec
from dovetail_tpu.mesh import AXIS, Split, split_of
from dovetail_tpu.quantized import Codes


class Placement:
    """Where the tensors of a model, or of tables, go on so many devices.

    Outputs of merged layers are put in an order in which each device has all of what belongs together: queries, keys
    and values of its heads; gate and up of its inner features. Where there are fewer key/value heads than devices,
    several have the same one. What reads the outputs goes by this order: attention's projection,
    :func:`~dovetail_tpu.mesh.over_features`, :func:`~dovetail_tpu.mesh.over_inner`.

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

    def of(self, path: str, held: Any) -> Layout:
        """How what a module holds is to lie.

        Args:
            path: dotted names of the modules around it, and its own.
            held: a tensor, or a container of those of one layer's weight.
        """
        split = split_of(path) if self._devices > 1 else Split.WHOLE
        order = next((order for layer, order in self._orders.items() if path.startswith(f"{layer}.")), None)
        return Layout(path, self._devices, split, order, frozenset(map(id, _grids_across(held))))


@dataclass(frozen=True, slots=True)
class Layout:
    """How the tensors of one layer lie on devices, in whatever format its weight is.

    The weight is ``[O, J]``, its scales and zero points ``[O, G]``, with a dimension for experts before, and its bias
    ``[O]``. Numbers for all outputs, and the order of inputs, every device has whole; so it has what outputs do not
    divide. Groups of inputs are not cut.

    Attributes:
        path: of the layer.
        devices: how many.
        split: along what.
        order: of the outputs, if not their own.
        across: identities of scales and zero points that are ``[G, O]``.
    """

    path: str
    devices: int
    split: Split
    order: Tensor | None
    across: frozenset[int]

    def of(self, host: Tensor) -> tuple[Tensor, Spec]:
        """What the devices are to have of a tensor, and how it is split among them.

        Raises:
            ConfigError: it cannot be split.
        """
        if host.ndim == 0 or host.numel() == 1 or (host.ndim == 1 and not host.is_floating_point()):
            return host, ()
        outputs, inputs = (-1, -2) if host.ndim == 1 or id(host) in self.across else (-2, -1)
        if self.order is not None:
            host = self._ordered(host, outputs)
        dim = {Split.OUTPUTS: outputs, Split.INPUTS: inputs}.get(self.split)
        return host, () if dim is None or host.ndim == 1 else self._spec(host.shape, dim)

    def _ordered(self, host: Tensor, outputs: int) -> Tensor:
        assert self.order is not None
        count = int(self.order.max()) + 1
        if host.shape[outputs] != count:
            raise ConfigError(
                f"{self.path}: a part of {host.shape[outputs]} of {count} outputs has scales of activations of its own,"
                f" and so is not split among {self.devices} devices. Take one device, or a checkpoint with the same "
                "input scales for all parts of a layer, or with dynamic ones."
            )
        return host.index_select(outputs, self.order.to(host.device))

    def _spec(self, shape: Sequence[int], dim: int) -> Spec:
        size = shape[dim]
        if size == 1 or (size % self.devices and self.split is Split.OUTPUTS):
            return ()
        if size % self.devices:
            good = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
            raise ConfigError(
                f"{self.path}: {size} inputs, or groups of inputs that share a scale, do not divide evenly among "
                f"{self.devices} devices. Take as many chips as make {good} devices, or a checkpoint with other groups."
            )
        axes: list[str | None] = [None] * len(shape)
        axes[dim] = AXIS
        return tuple(axes)


def _grids_across(held: Any) -> Iterator[Tensor]:
    """Scales and zero points with groups before outputs."""
    if isinstance(held, Codes):
        yield from (grid for grid in (held.scale, held.zero) if grid is not None)
    elif isinstance(held, list | tuple):
        for item in held:
            yield from _grids_across(item)


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
