"""What every number format does."""

import torch

from dovetail.testing.conformance import QuantSuite, registered


class TestMethod(QuantSuite):
    subject = registered("sketch")
    sections = ({"quant_method": "sketch", "bits": 8},)
    error = 0.01

    @staticmethod
    def store(weight_OI, section):
        scale_O1 = weight_OI.abs().amax(1, keepdim=True) / 127
        return {"weight": (weight_OI / scale_O1).round().to(torch.int8), "weight_scale": scale_O1}
