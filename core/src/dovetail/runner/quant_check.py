"""Held to its word: what a number format claims, tried at load on a small layer. See also :mod:`.self_check`."""

from __future__ import annotations

import torch
from torch import nn

from dovetail.config import Selection
from dovetail.contracts.ops import OpTable
from dovetail.contracts.quant import QuantMethod
from dovetail.errors import ConfigError
from dovetail.layers.experts import ExpertsLinear
from dovetail.layers.linear import Linear, Unquantized
from dovetail.runner.self_check import TOLERANCE, lie

IN_FEATURES, OUT_FEATURES, ROWS = 256, 64, 8
_OPTION = "--quantization"


def check_use(part: Selection, quant: QuantMethod, model: nn.Module) -> None:
    """Require that some layer is in the format: what was asked for would silently not be done.

    Raises:
        PluginLoadError: it applies to none.
    """
    formats = [module.quant for module in model.modules() if isinstance(module, Linear | ExpertsLinear)]
    if formats and quant not in formats and type(quant) is not Unquantized:
        raise lie(part, _OPTION, "applies to none of the model's layers, so all weights would stay plain")


@torch.inference_mode()
def check_product(part: Selection, quant: QuantMethod, dtype: torch.dtype) -> None:
    """Quantize a layer of normally distributed weights on load, and compare its product with the exact one.

    It runs on the host, on the reference operations: what the format does is tried, not the platform.

    Raises:
        PluginLoadError: the product is of another shape or dtype, not finite, or loses more than the manifest says.
    """
    devices = part.claims.get("device_types")
    if not part.claims or (devices and "cpu" not in devices) or type(quant) is Unquantized:
        return
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn((OUT_FEATURES, IN_FEATURES), generator=generator).to(dtype)
    x_TI = torch.randn((ROWS, IN_FEATURES), generator=generator).to(dtype)
    exact_TO = x_TI.double() @ weight_OI.double().t()
    ops = OpTable()
    try:
        if set(quant.tensors(IN_FEATURES, OUT_FEATURES, dtype)) != {"weight"}:
            return  # the loader compares what it expects with the checkpoint's files
        out_TO = quant.apply(x_TI, quant.prepare({"weight": weight_OI}, ops, dtype), None, ops)
    except ConfigError:  # a layer of other sizes than the model's may be beyond it
        return
    if out_TO.shape != exact_TO.shape or out_TO.dtype != dtype:
        what = f"{out_TO.dtype} {list(out_TO.shape)} instead of {dtype} {list(exact_TO.shape)}"
        raise lie(part, _OPTION, f"returns {what}".replace("torch.", ""))
    error = float((out_TO.double() - exact_TO).norm() / exact_TO.norm())
    allowed = part.claims["error"] + TOLERANCE[dtype]
    if not error <= allowed:
        what = f"its product of a small layer is off by {error:.2g} where {allowed:.2g} is allowed"
        raise lie(part, _OPTION, f"claims an error of {part.claims['error']:g}, but {what}")
