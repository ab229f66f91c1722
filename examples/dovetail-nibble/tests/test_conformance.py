"""The suite that every number format passes."""

from dovetail_nibble.packing import quantize

from dovetail.testing.conformance import PluginSuite, QuantSuite, registered


class TestNibble(QuantSuite):
    subject = registered("nibble")
    sections = ({"quant_method": "nibble", "bits": 4, "group_size": 4},)

    @staticmethod
    def store(weight_OI, section):
        packed, scale = quantize(weight_OI, section["group_size"])
        return {"weight_packed": packed, "weight_scale": scale}


class TestPlugin(PluginSuite):
    plugin = "nibble"
