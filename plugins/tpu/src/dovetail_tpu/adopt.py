"""Bringing what compiled steps read to the chip: the tensors that a model's modules hold, and tables."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from dovetail.tensors import leaves, replaced
from dovetail_tpu.bridges.protocol import Bridge
from dovetail_tpu.placement import Layout, Placement

TORCHS_OWN = frozenset({"_parameters", "_buffers", "_modules"})


class Adoption:
    """One walk over a model or a table. A tensor that is met twice, such as an embedding tied to the head, stays one.

    A module's attributes are replaced one by one, and each of the host's tensors goes with the last that holds it: so
    the host never has all of a model that is on the chip already.
    """

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._placement = Placement(None, bridge.num_devices)
        self._adopted: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def of(self, value: Any) -> Any:
        """What to use in place of ``value``: a module itself, with other tensors; containers anew.

        Raises:
            ConfigError: a model does not divide evenly among the devices.
        """
        if not isinstance(value, nn.Module):
            return replaced(value, partial(self._tensor, layout=self._placement.of("", value)))
        self._placement = Placement(value, self._bridge.num_devices)
        for path, module in value.named_modules():
            for own in (module._parameters, module._buffers):
                for name in [name for name, tensor in own.items() if tensor is not None]:
                    vars(module)[name] = own.pop(name)  # as a plain attribute; a parameter must be torch's own
            for name in [*vars(module)]:
                if name not in TORCHS_OWN and any(isinstance(leaf, Tensor) for leaf in leaves(vars(module)[name])):
                    layout = self._placement.of(f"{path}.{name}", vars(module)[name])
                    vars(module)[name] = replaced(vars(module)[name], partial(self._tensor, layout=layout))
        return value

    def _tensor(self, host: Tensor, layout: Layout) -> Tensor:
        if host not in self._adopted:
            self._adopted[host] = self._bridge.adopt(*layout.of(host))
        adopted: Tensor = self._adopted[host]
        return adopted
