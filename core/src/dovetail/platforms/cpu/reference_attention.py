"""The oracle among attention backends: plain paged cache, reference operations, any device, any shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.contracts.attention import AttentionBackend, AttentionSpec, StepTensors
from dovetail.contracts.ops import OpTable


@dataclass(frozen=True, slots=True)
class ReferenceMetadata:
    """The step's tables of one KV group."""

    block_table_RB: Tensor
    query_start_R1: Tensor
    seq_lens_R: Tensor
    slot_mapping_T: Tensor


class ReferenceAttention(AttentionBackend):
    """Keys and values in ``[B, P, N, K]`` each; attention by :func:`dovetail.ops.reference.paged_attention`."""

    def __init__(
        self, *, ops: OpTable, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype, block_size: int
    ) -> None:
        self._ops = ops
        self._device = device
        self._dtype = kv_dtype
        self._block_size = block_size

    def page_bytes(self, spec: AttentionSpec) -> int:
        """Keys and values of one block."""
        return 2 * self._block_size * spec.num_kv_heads * spec.head_size * self._dtype.itemsize

    def allocate(self, spec: AttentionSpec, num_blocks: int) -> tuple[Tensor, Tensor]:
        """Two zeroed tensors; zeros keep masked pages finite."""
        shape = (num_blocks, self._block_size, spec.num_kv_heads, spec.head_size)
        return (
            torch.zeros(shape, dtype=self._dtype, device=self._device),
            torch.zeros(shape, dtype=self._dtype, device=self._device),
        )

    def build_metadata(self, step: StepTensors, group: int) -> ReferenceMetadata:
        """Pick the group's tables."""
        return ReferenceMetadata(
            step.block_tables[group], step.query_start_R1, step.seq_lens_R, step.slot_mapping[group]
        )

    def forward(
        self,
        q_THK: Tensor,
        k_TNK: Tensor,
        v_TNK: Tensor,
        cache: tuple[Tensor, Tensor],
        metadata: ReferenceMetadata,
        spec: AttentionSpec,
    ) -> Tensor:
        """Store, then attend."""
        k_cache_BPNK, v_cache_BPNK = cache
        self._ops.write_kv(k_TNK, v_TNK, k_cache_BPNK, v_cache_BPNK, metadata.slot_mapping_T)
        return self._ops.paged_attention(
            q_THK,
            k_cache_BPNK,
            v_cache_BPNK,
            metadata.block_table_RB,
            metadata.query_start_R1,
            metadata.seq_lens_R,
            spec.scale,
            spec.window,
            spec.soft_cap,
        )
