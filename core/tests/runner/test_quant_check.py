"""The self-check of number formats at load: honest ones pass, and each lie is refused, with words that help."""

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dovetail.config import Selection
from dovetail.contracts.model import ModelContext
from dovetail.contracts.ops import OpTable
from dovetail.contracts.quant import QuantMethod, TensorSpec
from dovetail.errors import ConfigError, PluginLoadError
from dovetail.layers.experts import Experts
from dovetail.layers.linear import Linear, Unquantized
from dovetail.runner.quant_check import check_product, check_use

PART = Selection(
    name="grains",
    target="grains:Grains",
    distribution="dist-grains",
    version="3.1",
    why="",
    plugin="grains",
    claims={"error": 0.012, "device_types": []},
)


class Grains(QuantMethod):
    """int8 with a scale per output."""

    @classmethod
    def recognises(cls, quantization_config):
        return False

    def __init__(self, quantization_config=None):
        """Nothing to configure."""

    def applies_to(self, layer):
        return True

    def tensors(self, in_features, out_features, dtype):
        return {"weight": TensorSpec(shape=(out_features, in_features), dtype=dtype)}

    def prepare(self, tensors, ops, dtype):
        weight_OI = tensors["weight"].float()
        scale_O1 = weight_OI.abs().amax(1, keepdim=True) / 127
        return (weight_OI / scale_O1).round() * scale_O1

    def apply(self, x_TI, packed, bias_O, ops):
        return F.linear(x_TI, packed.to(x_TI.dtype), bias_O)


class Wide(Grains):
    def apply(self, x_TI, packed, bias_O, ops):
        return super().apply(x_TI.float(), packed, bias_O, ops)


class Narrow(Grains):
    def apply(self, x_TI, packed, bias_O, ops):
        return super().apply(x_TI, packed, bias_O, ops)[:, 1:]


class Shifted(Grains):
    def prepare(self, tensors, ops, dtype):
        return super().prepare(tensors, ops, dtype) + 0.1


class Infinite(Grains):
    def prepare(self, tensors, ops, dtype):
        return super().prepare(tensors, ops, dtype) / 0


LIES = {
    Wide: r"returns float32 \[8, 64\] instead of bfloat16 \[8, 64\]\.",
    Narrow: r"returns bfloat16 \[8, 63\] instead of bfloat16 \[8, 64\]\.",
    Shifted: r"claims an error of 0\.012, but its product of a small layer is off by 0\.11 where 0\.052 is allowed\.",
    Infinite: r"is off by nan where",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_honest_format_passes(dtype):
    check_product(PART, Grains(), dtype)


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_a_lying_format_is_refused(lie):
    with pytest.raises(PluginLoadError, match=LIES[lie]) as caught:
        check_product(PART, lie(), torch.bfloat16)
    assert str(caught.value).startswith("The self-check of 'grains' of plugin 'grains' (dist-grains 3.1) failed: it ")
    assert "Choose another --quantization" in str(caught.value)


def test_what_cannot_be_tried_on_the_host_is_not_tried():
    on_a_chip = msgspec.structs.replace(PART, claims={**PART.claims, "device_types": ["abacus"]})
    check_product(on_a_chip, Shifted(), torch.bfloat16)


def test_a_format_that_refuses_the_size_of_the_small_layer_may_do_those_of_the_model():
    class Groups(Shifted):
        def tensors(self, in_features, out_features, dtype):
            raise ConfigError(f"{in_features} is no multiple of 1024.")

    check_product(PART, Groups(), torch.bfloat16)


def layers(quant):
    context = ModelContext(ops=OpTable(), dtype=torch.float32, device=torch.device("cpu"), quant=quant, max_model_len=8)
    return nn.ModuleList([Linear(context, "a", 8, 8), Experts(context, "b", 2, 8, 8)])


@pytest.mark.parametrize("applies", [lambda name: False, lambda name: None])
def test_a_format_that_applies_to_nothing_is_refused(applies):
    quant = Grains()
    quant.applies_to = applies
    with pytest.raises(PluginLoadError, match=r"applies to none of the model.s layers, so all weights"):
        check_use(PART, quant, layers(quant))


@pytest.mark.parametrize("name", ["a", "b"])
def test_one_layer_is_enough(name):
    quant = Grains()
    quant.applies_to = lambda layer: layer == name
    check_use(PART, quant, layers(quant))


def test_plain_weights_and_models_of_other_layers_pass():
    plain = Unquantized()
    check_use(PART, plain, layers(plain))
    check_use(PART, Grains(), nn.ModuleList([nn.Linear(2, 2)]))
