"""What every number format does."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dovetail.testing.conformance import PluginSuite, QuantSuite, registered


class TestMethod(QuantSuite):
    subject = registered("sketch")
    sections = ({"quant_method": "sketch", "bits": 8},)

    @staticmethod
    def store(weight_OI: Tensor, section: Mapping[str, Any]) -> Mapping[str, Tensor]:
        scale_O1 = weight_OI.abs().amax(1, keepdim=True) / 127
        return {"weight": (weight_OI / scale_O1).round().to(torch.int8), "weight_scale": scale_O1}


class TestPlugin(PluginSuite):
    plugin = "sketch"
