"""The CPU platform's operations: native kernels where a dtype has them. Meanings: :mod:`dovetail.ops.reference`.

Every row of a result depends on its own row of the input alone, bit for bit: a request gets the same numbers alone, in
any batch, in any chunking, on any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dovetail.ops import reference
from dovetail.ops.sampling import SamplingTensors
from dovetail.platforms.cpu.expert_ops import ExpertOps
from dovetail.platforms.cpu.kernels import Kernels
from dovetail.platforms.cpu.pages import Arena, Scratch
from dovetail.platforms.cpu.quantized_ops import QuantizedOps

NATIVE_DTYPES = (torch.bfloat16, torch.float32)
SCRATCH = Scratch()
MANY_ROWS = 64
"""Tokens from which results may be large enough to come from ``SCRATCH``."""
MANY_OUTPUTS = 16384
"""The same for the outputs of a linear layer, whatever the number of tokens."""


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight in panels; see ``native/linear.c``.

    Attributes:
        storage: owns the memory behind ``address``.
        bf16: 1 for bf16, 0 for fp32.
    """

    storage: Tensor
    address: int
    dtype: torch.dtype
    bf16: int
    outputs: int
    inputs: int


class CpuOps:
    """Operations on activations of one dtype, ``bfloat16`` or ``float32``. Inputs of another run on the reference."""

    def __init__(self, kernels: Kernels, dtype: torch.dtype) -> None:
        library = kernels.library
        self._dtype = dtype
        self._bf16 = int(dtype == torch.bfloat16)
        self._weight_dtypes = (dtype, torch.float32)  # of norms
        self._norm = library.dovetail_norm
        self._rotary = library.dovetail_rotary
        self._silu = library.dovetail_silu_and_mul
        self._gelu = library.dovetail_gelu_tanh_and_mul
        self._linear = library.dovetail_linear
        self._pack = library.dovetail_pack
        self._packed_bytes = library.dovetail_packed_bytes
        self._gather = library.dovetail_gather
        self._argmax = library.dovetail_argmax
        self._arena = Arena()
        self._quantized = QuantizedOps(kernels)
        self._experts = ExpertOps(kernels)

    def table(self) -> Mapping[str, Callable[..., Any]]:
        """Overrides for :class:`dovetail.contracts.ops.OpTable`."""
        return {
            "rms_norm": self.rms_norm,
            "add_rms_norm": self.add_rms_norm,
            "rotary": self.rotary,
            "silu_and_mul": self.silu_and_mul,
            "gelu_tanh_and_mul": self.gelu_tanh_and_mul,
            "linear_pack": self.linear_pack,
            "linear": self.linear,
            "embedding": self.embedding,
            "sample": self.sample,
            **self._quantized.table(),
            **self._experts.table(),
        }

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """See the reference."""
        if x_TD.dtype is not self._dtype or weight_D.dtype not in self._weight_dtypes:
            return reference.rms_norm(x_TD, weight_D, eps)
        x = x_TD.contiguous()
        size = x.shape[-1]
        rows = x.numel() // size
        out = torch.empty_like(x) if rows < MANY_ROWS else SCRATCH.empty(x.shape, x.dtype)
        self._norm(
            self._bf16, weight_D.dtype is torch.bfloat16, x.data_ptr(), size, None, weight_D.data_ptr(), out.data_ptr(),
            None, rows, size, eps,
        )  # fmt: skip
        return out

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See the reference."""
        dtype = self._dtype
        if x_TD.dtype is not dtype or residual_TD.dtype is not dtype or weight_D.dtype not in self._weight_dtypes:
            return reference.add_rms_norm(x_TD, residual_TD, weight_D, eps)
        x, residual = x_TD.contiguous(), residual_TD.contiguous()
        size = x.shape[-1]
        rows = x.numel() // size
        if rows < MANY_ROWS:
            out, total = torch.empty_like(x), torch.empty_like(x)
        else:
            out, total = SCRATCH.empty(x.shape, dtype), SCRATCH.empty(x.shape, dtype)
        self._norm(
            self._bf16, weight_D.dtype is torch.bfloat16, x.data_ptr(), size, residual.data_ptr(), weight_D.data_ptr(),
            out.data_ptr(), total.data_ptr(), rows, size, eps,
        )  # fmt: skip
        return out, total

    def rotary(
        self, q_THK: Tensor, k_TNK: Tensor, positions_T: Tensor, cos_sin_PK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """In place: returns ``q`` and ``k`` themselves, unless their heads do not lie side by side."""
        if q_THK.dtype is not self._dtype or k_TNK.dtype is not self._dtype or cos_sin_PK.dtype is not torch.float32:
            return reference.rotary(q_THK, k_TNK, positions_T, cos_sin_PK)
        q, k = heads_side_by_side(q_THK), heads_side_by_side(k_TNK)
        tokens, q_heads, head_size = q.shape
        self._rotary(
            self._bf16, q.data_ptr(), q.stride(0), q_heads, k.data_ptr(), k.stride(0), k.shape[1], head_size,
            positions_T.data_ptr(), cos_sin_PK.data_ptr(), cos_sin_PK.shape[1], tokens,
        )  # fmt: skip
        return q, k

    def silu_and_mul(self, x_T2F: Tensor) -> Tensor:
        """See the reference."""
        if x_T2F.dtype is not self._dtype:
            return reference.silu_and_mul(x_T2F)
        return self._gated(self._silu, x_T2F)

    def gelu_tanh_and_mul(self, x_T2F: Tensor) -> Tensor:
        """See the reference."""
        if x_T2F.dtype is not self._dtype:
            return reference.gelu_tanh_and_mul(x_T2F)
        return self._gated(self._gelu, x_T2F)

    def _gated(self, kernel: Callable[..., None], x_T2F: Tensor) -> Tensor:
        x = x_T2F.contiguous()
        *rows_shape, double = x.shape
        size = double // 2
        rows = x.numel() // double
        shape = (*rows_shape, size)
        out = x.new_empty(shape) if rows < MANY_ROWS else SCRATCH.empty(shape, x.dtype)
        kernel(self._bf16, x.data_ptr(), out.data_ptr(), rows, size)
        return out

    def linear_pack(self, weight_OI: Tensor) -> PackedLinear | Tensor:
        """Copy into panels. Other dtypes than bf16 and fp32, and odd bf16 inputs, stay as they are."""
        outputs, inputs = weight_OI.shape
        bf16 = int(weight_OI.dtype == torch.bfloat16)
        if weight_OI.dtype not in NATIVE_DTYPES or (bf16 and inputs % 2):
            return weight_OI
        weight = weight_OI.contiguous()
        storage = self._arena.take(self._packed_bytes(bf16, outputs, inputs))
        self._pack(bf16, weight.data_ptr(), storage.data_ptr(), outputs, inputs)
        return PackedLinear(storage, storage.data_ptr(), weight.dtype, bf16, outputs, inputs)

    def linear(self, x_TI: Tensor, packed: PackedLinear | Tensor, bias_O: Tensor | None = None) -> Tensor:
        """See the reference. ``x`` may be a slice of rows or columns."""
        if isinstance(packed, Tensor):
            return reference.linear(x_TI, packed, bias_O)
        rows, inputs = x_TI.shape
        assert x_TI.dtype is packed.dtype, (x_TI.dtype, packed.dtype)
        assert inputs == packed.inputs, (inputs, packed.inputs)
        x = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
        shape = (rows, packed.outputs)
        small = rows < MANY_ROWS and packed.outputs < MANY_OUTPUTS
        out = x.new_empty(shape) if small else SCRATCH.empty(shape, x.dtype)
        self._linear(
            packed.bf16, x.data_ptr(), x.stride(0), packed.address, None if bias_O is None else bias_O.data_ptr(),
            out.data_ptr(), rows, inputs, packed.outputs,
        )  # fmt: skip
        return out

    def embedding(self, ids_T: Tensor, table_VD: Tensor | PackedLinear) -> Tensor:
        """See the reference. The table may also be a packed weight, so that a tied head needs no second copy.

        Raises:
            IndexError: an id is no row of the table.
        """
        if isinstance(table_VD, Tensor):
            return reference.embedding(ids_T, table_VD)
        ids, packed = ids_T.contiguous(), table_VD
        out = torch.empty((*ids.shape, packed.inputs), dtype=packed.dtype)
        if self._gather(
            packed.bf16, ids.data_ptr(), ids.numel(), packed.address, out.data_ptr(), packed.inputs, packed.outputs
        ):
            raise IndexError(f"A token id is outside 0 .. {packed.outputs - 1}.")
        return out

    def sample(self, logits_SV: Tensor, params: SamplingTensors) -> Tensor:
        """See the reference; the largest logit is found natively."""
        if not params.all_greedy or logits_SV.dtype not in NATIVE_DTYPES or logits_SV.stride(1) != 1:
            return reference.sample(logits_SV, params)
        rows, size = logits_SV.shape
        out = torch.empty(rows, dtype=torch.int64)
        bf16 = int(logits_SV.dtype is torch.bfloat16)
        self._argmax(bf16, logits_SV.data_ptr(), logits_SV.stride(0), out.data_ptr(), rows, size)
        return out


def heads_side_by_side(x_THK: Tensor) -> Tensor:
    """``x``, copied if the heads of a token are not contiguous."""
    _, head_stride, element_stride = x_THK.stride()
    if element_stride == 1 and head_stride == x_THK.shape[2]:
        return x_THK
    return x_THK.contiguous()
