"""Linear layers in a number format, loaded from a checkpoint as those of a model are, and watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.contracts.executor import Progress
from dovetail.contracts.model import Model, ModelContext, ModelFacts, Rename, StepAttention, WeightTable
from dovetail.contracts.ops import OpTable
from dovetail.contracts.quant import PackedLinear, QuantMethod, TensorSpec
from dovetail.layers.linear import Linear, MergedLinear
from dovetail.runner.loader import load_weights
from dovetail.testing.conformance.checkpoints import write_checkpoint

MERGED, SINGLE = "layers.0.qkv_proj", "layers.0.o_proj"
"""Dotted names of the probe's only layer, with several parts and with one."""
PARTS = ("q", "k", "v")


class Probe(Model):
    """A "model" of one layer, which is loaded as those of a model are, and is called by itself."""

    @classmethod
    def facts(cls, hf_config: Mapping[str, Any]) -> ModelFacts:
        """There is no attention."""
        return ModelFacts(attention=[], vocab_size=1, max_positions=1, dtype=torch.float32)

    def forward(self, token_ids_T: Tensor, positions_T: Tensor, attend: StepAttention) -> Tensor:
        """Nothing calls it."""
        raise AssertionError("a probe is no model")

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Nothing calls it."""
        raise AssertionError("a probe is no model")


class LinearProbe(Probe):
    """One linear layer.

    Its config holds ``in_features``, ``outputs`` (output features of one part, or of three to merge) and ``bias``.
    """

    def __init__(self, hf_config: Mapping[str, Any], context: ModelContext) -> None:
        super().__init__(hf_config, context)
        in_features, outputs, bias = hf_config["in_features"], hf_config["outputs"], hf_config["bias"]
        layer = nn.Module()
        self.layers = nn.ModuleList([layer])
        if len(outputs) == 1:
            self.linear = Linear(context, SINGLE, in_features, outputs[0], bias=bias)
            layer.o_proj = self.linear
        else:
            parts = dict(zip(PARTS, outputs, strict=True))
            self.linear = MergedLinear(context, MERGED, in_features, parts, bias=bias)
            layer.qkv_proj = self.linear

    def weight_table(self) -> WeightTable:
        """Three tensors of the checkpoint fill the merged layer."""
        return WeightTable(renames=[Rename(f"{part}_proj", "qkv_proj", part) for part in PARTS], ignore=("linear.",))

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """The layer itself."""
        product_SO: Tensor = self.linear(hidden_SD)
        return product_SO


class Watched(QuantMethod):
    """Passes everything on to a method, and keeps what a caller cannot see otherwise.

    Attributes:
        loaded, untouched: tensors that ``prepare`` got, and copies of them made before.
        packed: what it returned.
    """

    def __init__(self, method: QuantMethod) -> None:
        self._method = method
        self.loaded: dict[str, Tensor] = {}
        self.untouched: dict[str, Tensor] = {}
        self.packed: PackedLinear = None

    @classmethod
    def recognises(cls, quantization_config: Mapping[str, Any]) -> bool:
        """Nobody asks."""
        return False

    def applies_to(self, layer: str) -> bool:
        """As the method says."""
        return self._method.applies_to(layer)

    def tensors(self, in_features: int, out_features: int, dtype: torch.dtype) -> Mapping[str, TensorSpec]:
        """As the method says."""
        return self._method.tensors(in_features, out_features, dtype)

    def prepare(self, tensors: Mapping[str, Tensor], ops: OpTable, dtype: torch.dtype) -> PackedLinear:
        """Keep what goes in and what comes out."""
        self.loaded = dict(tensors)
        self.untouched = {suffix: tensor.clone() for suffix, tensor in tensors.items()}
        self.packed = self._method.prepare(tensors, ops, dtype)
        return self.packed

    def apply(self, x_TI: Tensor, packed: PackedLinear, bias_O: Tensor | None, ops: OpTable) -> Tensor:
        """As the method says."""
        return self._method.apply(x_TI, packed, bias_O, ops)


def load_probe(
    folder: Path, context: ModelContext, tensors: Mapping[str, Tensor], in_features: int, outputs: list[int]
) -> LinearProbe:
    """The probe with these tensors, by their names in the checkpoint, which is written into ``folder``."""
    bias = any(name.endswith(".bias") for name in tensors)
    config = {"in_features": in_features, "outputs": outputs, "bias": bias}
    write_checkpoint(folder, config, tensors)
    with torch.inference_mode():
        probe = LinearProbe(config, context)
        load_weights(probe, folder, Progress())
    return probe


class Opaque:
    """Packed weights in which nobody can read."""

    def __init__(self, packed: Any) -> None:
        self.packed = packed


def spying_ops(table: OpTable, used: set[str]) -> OpTable:
    """The same operations; they note their names in ``used``, and what a ``…_pack`` returns is opaque to all others."""

    def spied(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            used.add(name)
            result = operation(*(a.packed if isinstance(a, Opaque) else a for a in arguments))
            return Opaque(result) if name.endswith("_pack") else result

        return call

    return OpTable(**{name: spied(name, getattr(table, name)) for name in OpTable.names()})


def held_bytes(value: Any) -> int:
    """Bytes of all storages that tensors within ``value`` keep alive."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _within(value, 6)}
    return sum(storages.values())


def _within(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if depth == 0:
        return
    parts: list[Any] = []
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif is_dataclass(value):
        parts = [getattr(value, field.name) for field in fields(value)]
    elif hasattr(value, "__dict__"):
        parts = list(vars(value).values())
    for part in parts:
        yield from _within(part, depth - 1)
