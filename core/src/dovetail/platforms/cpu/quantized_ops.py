"""The CPU platform's operations on numbers of 8 bits. Meanings: :mod:`dovetail.ops.reference`.

As everywhere on this platform, a row of a result depends on its own row of the input alone, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.ops import reference
from dovetail.ops.reference import ScaledWeight
from dovetail.platforms.cpu.kernels import Kernels
from dovetail.platforms.cpu.pages import Arena, Scratch

FP8 = torch.float8_e4m3fn
CODES = (torch.int8, FP8)
OUT_DTYPES = (torch.bfloat16, torch.float32)
PANEL = 64
"""Outputs that lie side by side in a packed weight."""
SCRATCH = Scratch()
MANY_ROWS = 64
"""Tokens from which results may be large enough to come from ``SCRATCH``."""


@dataclass(frozen=True, slots=True)
class Codes:
    """A weight in panels of codes; see ``native/linear8.c``.

    Attributes:
        storage: owns the memory.
        fp8: 1 for fp8, 0 for int8.
        scale_GO: contiguous; None where the scales come with each product.
        group: inputs that share a scale.
    """

    storage: Tensor
    fp8: int
    scale_GO: Tensor | None
    group: int
    outputs: int
    inputs: int


@dataclass(frozen=True, slots=True)
class Integers:
    """An int8 weight in panels of four inputs; see ``native/linear_int8.c``.

    Attributes:
        storage: owns the memory.
        offset_O: int32, 128 times the sum of each output's weights, padded to whole panels.
        padding: zeros that a row of activations needs to have a multiple of four inputs.
    """

    storage: Tensor
    offset_O: Tensor
    padding: int
    outputs: int
    inputs: int


class QuantizedOps:
    """Products with 8-bit weights, and the quantization of activations. Weights with NaN run on the reference."""

    def __init__(self, kernels: Kernels) -> None:
        library = kernels.library
        self._linear8 = library.dovetail_linear8
        self._linear_int8 = library.dovetail_linear_int8
        self._quantize = library.dovetail_quantize
        self._pack = library.dovetail_pack
        self._arena = Arena()

    def table(self) -> Mapping[str, Callable[..., Any]]:
        """Overrides for :class:`dovetail.contracts.ops.OpTable`."""
        return {
            "quantize_rows": self.quantize_rows,
            "weight_only_pack": self.weight_only_pack,
            "weight_only_mm": self.weight_only_mm,
            "scaled_mm_pack": self.scaled_mm_pack,
            "scaled_mm": self.scaled_mm,
            "block_scaled_pack": self.block_scaled_pack,
            "block_scaled_mm": self.block_scaled_mm,
        }

    def quantize_rows(self, x_TI: Tensor, dtype: torch.dtype, group_size: int | None = None) -> tuple[Tensor, Tensor]:
        """See the reference, with which it agrees bit for bit."""
        if x_TI.dtype not in OUT_DTYPES or dtype not in CODES:
            return reference.quantize_rows(x_TI, dtype, group_size)
        x = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
        rows, inputs = x.shape
        group = group_size or inputs
        values_TI = torch.empty(x.shape, dtype=dtype)
        scale_TG = torch.empty(rows, -(-inputs // group))
        self._quantize(
            int(dtype == FP8), int(x.dtype == torch.bfloat16), x.data_ptr(), x.stride(0), values_TI.data_ptr(),
            scale_TG.data_ptr(), rows, inputs, group,
        )  # fmt: skip
        return values_TI, scale_TG

    def weight_only_pack(
        self, weight_OI: Tensor, scale_OG: Tensor, group_size: int | None = None
    ) -> Codes | ScaledWeight:
        """Copy into panels."""
        if not _is_native(weight_OI):
            return reference.weight_only_pack(weight_OI, scale_OG, group_size)
        return self._codes(weight_OI, scale_OG, group_size or weight_OI.shape[1])

    def weight_only_mm(self, x_TI: Tensor, packed: Codes | ScaledWeight, bias_O: Tensor | None = None) -> Tensor:
        """See the reference."""
        if isinstance(packed, ScaledWeight):
            return reference.weight_only_mm(x_TI, packed, bias_O)
        return self._product(x_TI, None, packed, packed.scale_GO, bias_O, x_TI.dtype)

    def block_scaled_pack(self, weight_OI: Tensor, scale_OG: Tensor, group_size: int) -> Codes | ScaledWeight:
        """Copy into panels."""
        if not _is_native(weight_OI):
            return reference.block_scaled_pack(weight_OI, scale_OG, group_size)
        return self._codes(weight_OI, scale_OG, group_size)

    def block_scaled_mm(
        self, x_TI: Tensor, packed: Codes | ScaledWeight, x_scale_TG: Tensor, out_dtype: torch.dtype
    ) -> Tensor:
        """See the reference."""
        if isinstance(packed, ScaledWeight):
            return reference.block_scaled_mm(x_TI, packed, x_scale_TG, out_dtype)
        return self._product(x_TI, x_scale_TG.contiguous(), packed, packed.scale_GO, None, out_dtype)

    def scaled_mm_pack(self, weight_OI: Tensor) -> Codes | Integers | Tensor:
        """Copy into panels."""
        if not _is_native(weight_OI):
            return weight_OI
        return self._integers(weight_OI) if weight_OI.dtype == torch.int8 else self._codes(weight_OI, None, 0)

    def scaled_mm(
        self,
        x_TI: Tensor,
        weight: Codes | Integers | Tensor,
        x_scale_T1: Tensor,
        weight_scale_O1: Tensor,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """See the reference; int8 sums are exact."""
        if isinstance(weight, Tensor):
            return reference.scaled_mm(x_TI, weight, x_scale_T1, weight_scale_O1, out_dtype)
        x_scale_T = x_scale_T1.expand(len(x_TI), 1).contiguous()
        scale_O = weight_scale_O1.expand(weight.outputs, 1).contiguous()
        if isinstance(weight, Integers):
            return self._integer_product(x_TI, x_scale_T, weight, scale_O, out_dtype)
        return self._product(x_TI, x_scale_T, weight, scale_O, None, out_dtype)

    def _codes(self, weight_OI: Tensor, scale_OG: Tensor | None, group: int) -> Codes:
        outputs, inputs = weight_OI.shape
        panels = -(-outputs // PANEL)
        storage = self._arena.take(panels * inputs * PANEL)
        padded = F.pad(weight_OI.contiguous().view(torch.uint8), (0, 0, 0, panels * PANEL - outputs))
        storage.view(panels, inputs, PANEL).copy_(padded.view(panels, PANEL, inputs).transpose(1, 2))
        scale_GO = None if scale_OG is None else scale_OG.t().float().contiguous()
        return Codes(storage, int(weight_OI.dtype == FP8), scale_GO, group or inputs, outputs, inputs)

    def _integers(self, weight_OI: Tensor) -> Integers:
        outputs, inputs = weight_OI.shape
        panels, padding = -(-outputs // PANEL), -inputs % 4
        fours = F.pad(weight_OI, (0, padding)).contiguous().view(torch.int32)
        storage = self._arena.take(panels * PANEL * fours.shape[1] * 4)
        self._pack(0, fours.data_ptr(), storage.data_ptr(), outputs, fours.shape[1])
        offset_O = weight_OI.sum(1, dtype=torch.int32) * 128
        return Integers(storage, F.pad(offset_O, (0, panels * PANEL - outputs)), padding, outputs, inputs)

    def _product(
        self,
        x_TI: Tensor,
        x_scale_TG: Tensor | None,
        packed: Codes,
        scale_GO: Tensor | None,
        bias_O: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        assert x_TI.shape[1] == packed.inputs, (x_TI.shape, packed.inputs)
        assert scale_GO is not None
        x = x_TI.float()
        x = x if x.stride(1) == 1 else x.contiguous()
        rows = len(x)
        out = _result(rows, packed.outputs, out_dtype)
        bias = None if bias_O is None else bias_O.to(out.dtype).contiguous()
        self._linear8(
            packed.fp8, int(out.dtype == torch.bfloat16), x.data_ptr(), x.stride(0),
            None if x_scale_TG is None else x_scale_TG.data_ptr(), packed.storage.data_ptr(), scale_GO.data_ptr(),
            None if bias is None else bias.data_ptr(), out.data_ptr(), rows, packed.inputs, packed.outputs,
            packed.group,
        )  # fmt: skip
        return out.to(out_dtype)

    def _integer_product(
        self, x_TI: Tensor, x_scale_T1: Tensor, packed: Integers, scale_O1: Tensor, out_dtype: torch.dtype
    ) -> Tensor:
        assert x_TI.shape[1] == packed.inputs, (x_TI.shape, packed.inputs)
        x = F.pad(x_TI, (0, packed.padding)) if packed.padding else x_TI.contiguous()
        out = _result(len(x), packed.outputs, out_dtype)
        self._linear_int8(
            int(out.dtype == torch.bfloat16), x.data_ptr(), x_scale_T1.data_ptr(), packed.storage.data_ptr(),
            packed.offset_O.data_ptr(), scale_O1.data_ptr(), out.data_ptr(), len(x), x.shape[1], packed.outputs,
        )  # fmt: skip
        return out.to(out_dtype)


def _is_native(weight_OI: Tensor) -> bool:
    """Whether the kernels read these codes: those of NaN they take for numbers."""
    if weight_OI.dtype != FP8:
        return weight_OI.dtype == torch.int8
    return not bool(((weight_OI.view(torch.uint8) & 127) == 127).any())


def _result(rows: int, outputs: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised, in ``dtype`` or else in float32, which can be rounded to it."""
    native = dtype if dtype in OUT_DTYPES else torch.float32
    shape = (rows, outputs)
    return torch.empty(shape, dtype=native) if rows < MANY_ROWS else SCRATCH.empty(shape, native)
