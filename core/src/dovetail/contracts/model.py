"""Model: one family, written for one device from the blocks of :mod:`dovetail.layers`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dovetail.contracts.attention import AttentionSpec, Preparation
from dovetail.contracts.ops import OpTable
from dovetail.contracts.quant import QuantMethod


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What the resolver needs to know about a checkpoint before anything is built.

    Attributes:
        attention: one spec per layer, in order; equal specs share a KV group.
        vocab_size: rows of the output head.
        max_positions: longest context that the checkpoint was made for.
        dtype: of the checkpoint's weights.
        needs: capabilities beyond those visible in ``attention``, by manifest field name.
    """

    attention: Sequence[AttentionSpec]
    vocab_size: int
    max_positions: int
    dtype: torch.dtype
    needs: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelContext:
    """What a model is built with.

    Attributes:
        ops: the platform's operations.
        dtype, device: of activations and unquantized weights.
        quant: the number format of linear layers.
        max_model_len: longest context served; rotary tables need not be longer.
    """

    ops: OpTable
    dtype: torch.dtype
    device: torch.device
    quant: QuantMethod
    max_model_len: int


class StepAttention(Protocol):
    """How a layer reaches attention within a step: storage, metadata and backend are bound already."""

    def __call__(self, layer: int, q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor) -> Tensor:
        """Store k and v, attend, and return ``[T, H × K]``."""
        ...


class ProjectedAttention(StepAttention, Protocol):
    """The form that the core passes: it also takes projections that are still to be prepared.

    Attributes:
        rows_S: of the form that :meth:`last` gives, the only rows that matter from this layer's attention on, int64
            ``[S]`` with S < T; otherwise None: all do.
    """

    rows_S: Tensor | None

    def last(self) -> ProjectedAttention:
        """The form for a model's last layer, after which most hidden states of a prompt are not read."""
        ...

    def projected(self, layer: int, qkv_TE: Tensor, positions_T: Tensor, preparation: Preparation) -> Tensor:
        """Prepare, store, attend, and return ``[T, H × K]``; the content of ``qkv`` is unspecified afterwards."""
        ...


@dataclass(frozen=True, slots=True)
class Rename:
    """One row of a weight table: where a checkpoint tensor goes.

    Attributes:
        pattern: whole dotted parts of a checkpoint's name, e.g. ``"q_proj"``; one ``*`` stands for any one part, e.g.
            ``"experts.*.gate_proj"``.
        into: the parts that replace them, e.g. ``"qkv_proj"`` or ``"experts.gate_up"``.
        shard: the output of the merged layer that it fills, e.g. ``"q"``; None fills all of it. A ``*`` in it becomes
            the part that the pattern's ``*`` stood for, e.g. ``"*.gate"``.
    """

    pattern: str
    into: str
    shard: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightTable:
    """How checkpoint names map to the model's.

    Attributes:
        renames: the first one that matches a name is applied, once.
        strip_prefixes: leading parts that some exports add.
        ignore: substrings of tensors that the model does not use, by design.
        tied: parameter -> parameter that it shares storage with when the checkpoint leaves it out.
    """

    renames: Sequence[Rename] = ()
    strip_prefixes: Sequence[str] = ()
    ignore: Sequence[str] = ()
    tied: Mapping[str, str] = field(default_factory=dict)


class Model(nn.Module, ABC):
    """One model family. The file that holds it owns config parsing, weight names and layer shapes."""

    @classmethod
    @abstractmethod
    def facts(cls, hf_config: Mapping[str, Any]) -> ModelFacts:
        """Read a checkpoint's config.json.

        Phase: resolve. Order: 1. Times: once. May raise: ConfigError.

        Raises:
            ConfigError: a field has a value that this family cannot honour; the message names both.
        """
        ...

    @abstractmethod
    def __init__(self, hf_config: Mapping[str, Any], context: ModelContext) -> None:
        """Create the modules. Blocks only declare their tensors here; the loader fills them.

        Phase: load. Order: 1. Times: once. May raise: ConfigError.
        """
        super().__init__()

    @abstractmethod
    def weight_table(self) -> WeightTable:
        """How checkpoint tensors map to this model's parameters.

        Phase: load. Order: 2. Times: once. May raise: nothing.
        """
        ...

    @abstractmethod
    def forward(self, token_ids_T: Tensor, positions_T: Tensor, attend: StepAttention) -> Tensor:
        """Hidden states ``[T, D]`` after the final norm; or the wanted rows alone, ``[S, D]``, if ``attend`` has a form
        for the last layer (:meth:`ProjectedAttention.last`) that names them, and the model makes use of it.

        Phase: step. Order: 1. Times: once. May raise: nothing.
        """
        ...

    @abstractmethod
    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Logits ``[S, V]`` of the given rows.

        Phase: step. Order: 2. Times: once, and once per chunk of prompt tokens that are scored. May raise: nothing.
        """
        ...
