"""The CPU platform's mixture of experts. Meanings: :mod:`dovetail.ops.reference`.

As everywhere on this platform, a row of a result depends on its own row of the input alone, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dovetail.ops import reference
from dovetail.platforms.cpu.kernels import Kernels
from dovetail.platforms.cpu.pages import Arena, Scratch

NATIVE_DTYPES = (torch.bfloat16, torch.float32)
SCRATCH = Scratch()


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """Stacked weights, each expert's in panels of its own; see ``native/panels.h``.

    Attributes:
        storage: owns the memory, expert after expert.
        bf16: 1 for bf16, 0 for fp32.
        experts, outputs, inputs: the shape.
    """

    storage: Tensor
    dtype: torch.dtype
    bf16: int
    experts: int
    outputs: int
    inputs: int


class ExpertOps:
    """Experts on bf16 and fp32. Those of other dtypes, and bf16 ones of odd sizes, run on the reference."""

    def __init__(self, kernels: Kernels) -> None:
        library = kernels.library
        self._pack = library.dovetail_pack
        self._packed_bytes = library.dovetail_packed_bytes
        self._gather = library.dovetail_gather
        self._experts = library.dovetail_experts
        self._arena = Arena()

    def table(self) -> Mapping[str, Callable[..., Any]]:
        """Overrides for :class:`dovetail.contracts.ops.OpTable`."""
        return {"experts_pack": self.experts_pack, "moe_experts": self.moe_experts}

    def experts_pack(self, weight_EOI: Tensor) -> PackedExperts | Tensor:
        """Copy into panels. Other dtypes than bf16 and fp32, and odd bf16 inputs, stay as they are."""
        experts, outputs, inputs = weight_EOI.shape
        bf16 = int(weight_EOI.dtype == torch.bfloat16)
        if weight_EOI.dtype not in NATIVE_DTYPES or (bf16 and inputs % 2):
            return weight_EOI
        num_bytes = self._packed_bytes(bf16, outputs, inputs)
        storage = self._arena.take(experts * num_bytes)
        for expert, weight_OI in enumerate(weight_EOI.contiguous()):
            self._pack(bf16, weight_OI.data_ptr(), storage[expert * num_bytes :].data_ptr(), outputs, inputs)
        return PackedExperts(storage, weight_EOI.dtype, bf16, experts, outputs, inputs)

    def moe_experts(
        self,
        x_TD: Tensor,
        gate_up_EFD: PackedExperts | Tensor,
        down_EDF: PackedExperts | Tensor,
        expert_ids_TA: Tensor,
        expert_weights_TA: Tensor,
    ) -> Tensor:
        """See the reference."""
        if isinstance(gate_up_EFD, Tensor) or isinstance(down_EDF, Tensor):
            gate_up, down = self._unpacked(gate_up_EFD), self._unpacked(down_EDF)
            return reference.moe_experts(x_TD, gate_up, down, expert_ids_TA, expert_weights_TA)
        assert x_TD.dtype is gate_up_EFD.dtype is down_EDF.dtype, (x_TD.dtype, gate_up_EFD.dtype, down_EDF.dtype)
        assert x_TD.shape[1] == gate_up_EFD.inputs == down_EDF.outputs, (x_TD.shape, gate_up_EFD, down_EDF)
        x, ids = x_TD.contiguous(), expert_ids_TA.to(torch.int64).contiguous()
        weights = expert_weights_TA.to(torch.float32).contiguous()
        tokens, active = ids.shape
        pairs, experts, inner = tokens * active, down_EDF.experts, down_EDF.inputs
        gate_up_N2F = SCRATCH.empty((pairs, 2 * inner), x.dtype)
        gated_NF = SCRATCH.empty((pairs, inner), x.dtype)
        down_ND = SCRATCH.empty((pairs, x.shape[1]), torch.float32)
        order = torch.empty(2 * (experts + 1 + pairs), dtype=torch.int64)
        out_TD = SCRATCH.empty(x.shape, x.dtype)
        self._experts(
            gate_up_EFD.bf16, x.data_ptr(), gate_up_EFD.storage.data_ptr(), down_EDF.storage.data_ptr(), ids.data_ptr(),
            weights.data_ptr(), out_TD.data_ptr(), gate_up_N2F.data_ptr(), gated_NF.data_ptr(), down_ND.data_ptr(),
            order.data_ptr(), tokens, active, experts, x.shape[1], inner,
        )  # fmt: skip
        return out_TD

    def _unpacked(self, packed: PackedExperts | Tensor) -> Tensor:
        """The weights as they were stacked."""
        if isinstance(packed, Tensor):
            return packed
        rows_O = torch.arange(packed.outputs)
        weight_EOI = torch.empty((packed.experts, packed.outputs, packed.inputs), dtype=packed.dtype)
        for weight_OI, panels in zip(weight_EOI, packed.storage.chunk(packed.experts), strict=True):
            self._gather(
                packed.bf16, rows_O.data_ptr(), packed.outputs, panels.data_ptr(), weight_OI.data_ptr(), packed.inputs,
                packed.outputs,
            )  # fmt: skip
        return weight_EOI
