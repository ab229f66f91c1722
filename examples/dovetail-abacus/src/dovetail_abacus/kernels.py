"""The operations that the abacus has kernels for; each means what ``dovetail.ops.reference`` says under its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail_abacus.device import beads_of, kernel

BEADS = 32
"""Output features that lie on one rod."""


@dataclass(frozen=True, slots=True)
class Rods:
    """A weight as the multiplier wants it: nobody else can read it.

    Attributes:
        rods_RIB: ``[rods, inputs, BEADS]``; the last rod is filled up with zeros.
        outputs: output features.
    """

    rods_RIB: Tensor
    outputs: int


def table() -> Mapping[str, Callable[..., Any]]:
    """The overrides of the op table."""
    return {
        "rms_norm": rms_norm,
        "add_rms_norm": add_rms_norm,
        "silu_and_mul": silu_and_mul,
        "linear_pack": linear_pack,
        "linear": linear,
        "embedding": embedding,
    }


@kernel
def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Computed in float32, rounded once."""
    return _rms_norm(x_TD, weight_D, eps)


@kernel
def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm reads the rounded sum."""
    total_TD = x_TD + residual_TD
    return _rms_norm(total_TD, weight_D, eps), total_TD


def _rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x_TD.float(), weight_D.shape, weight_D.float(), eps).to(x_TD.dtype)


@kernel
def silu_and_mul(x_T2F: Tensor) -> Tensor:
    """Computed in float32, rounded once."""
    gate_TF, up_TF = x_T2F.float().chunk(2, dim=-1)
    return (F.silu(gate_TF) * up_TF).to(x_T2F.dtype)


def linear_pack(weight_OI: Tensor) -> Rods:
    """String the outputs on rods."""
    weight_OI = beads_of(weight_OI)
    outputs, inputs = weight_OI.shape
    padded_OI = F.pad(weight_OI, (0, 0, 0, -outputs % BEADS))
    return Rods(padded_OI.view(-1, BEADS, inputs).transpose(1, 2).contiguous(), outputs)


@kernel
def linear(x_TI: Tensor, packed: Rods, bias_O: Tensor | None = None) -> Tensor:
    """Rod by rod."""
    y_RTB = torch.matmul(x_TI, packed.rods_RIB)
    y_TO = y_RTB.transpose(0, 1).flatten(1)[:, : packed.outputs]
    return y_TO.contiguous() if bias_O is None else y_TO + bias_O


@kernel
def embedding(ids_T: Tensor, table_VD: Tensor | Rods) -> Tensor:
    """Rows of a plain table, or of one that was packed because it is also the output head."""
    if isinstance(table_VD, Rods):
        return table_VD.rods_RIB[ids_T // BEADS, :, ids_T % BEADS]
    return F.embedding(ids_T, table_VD)
