"""The attention backend ``triton``: one cache tensor each for keys and values, pages of a head contiguous."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.contracts.attention import AttentionBackend, AttentionSpec, Preparation, StepTensors
from dovetail.contracts.ops import OpTable
from dovetail.errors import ConfigError
from dovetail_cuda.kernels.attention import paged_attention
from dovetail_cuda.kernels.cache import write_kv
from dovetail_cuda.kernels.projection import prepare_and_store

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class TritonMetadata:
    """The step's own tables of one KV group, nothing else: every program finds its request itself."""

    block_table_RB: Tensor
    query_start_R1: Tensor
    seq_lens_R: Tensor
    slot_mapping_T: Tensor


@dataclass(frozen=True, slots=True)
class TritonCache:
    """Keys and values of one layer, ``[B, N, P, K]`` each."""

    keys: Tensor
    values: Tensor


class TritonAttention(AttentionBackend):
    """Launches two kernels, or three where keys are split; none of them depends on values on the host."""

    def __init__(
        self, *, ops: OpTable, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype, block_size: int
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"triton attention computes in {', '.join(map(str, DTYPES))}, not {dtype}; use --dtype.")
        if kv_dtype not in (dtype, torch.float8_e4m3fn):
            raise ConfigError(
                f"triton attention stores keys and values in {dtype} or torch.float8_e4m3fn, not {kv_dtype}; "
                "use --kv-cache-dtype auto or float8_e4m3fn."
            )
        self._device, self._kv_dtype, self._block_size = device, kv_dtype, block_size

    def page_bytes(self, spec: AttentionSpec) -> int:
        """Keys and values of one block."""
        return 2 * self._block_size * spec.num_kv_heads * spec.head_size * self._kv_dtype.itemsize

    def allocate(self, spec: AttentionSpec, num_blocks: int) -> TritonCache:
        """Not initialised: what no query sees is not read."""
        shape = (num_blocks, spec.num_kv_heads, self._block_size, spec.head_size)
        keys, values = (torch.empty(shape, dtype=self._kv_dtype, device=self._device) for _ in range(2))
        return TritonCache(keys, values)

    def build_metadata(self, step: StepTensors, group: int) -> TritonMetadata:
        """References only: nothing is launched."""
        return TritonMetadata(
            block_table_RB=step.block_tables[group],
            query_start_R1=step.query_start_R1,
            seq_lens_R=step.seq_lens_R,
            slot_mapping_T=step.slot_mapping[group],
        )

    def forward(
        self,
        q_THK: Tensor,
        k_TNK: Tensor,
        v_TNK: Tensor,
        cache: TritonCache,
        metadata: TritonMetadata,
        spec: AttentionSpec,
    ) -> Tensor:
        """Store, then attend."""
        k_cache_BPNK, v_cache_BPNK = cache.keys.transpose(1, 2), cache.values.transpose(1, 2)
        write_kv(k_TNK, v_TNK, k_cache_BPNK, v_cache_BPNK, metadata.slot_mapping_T)
        return self._attend(q_THK, cache, metadata, spec)

    def forward_projected(
        self,
        qkv_TE: Tensor,
        positions_T: Tensor,
        preparation: Preparation,
        cache: TritonCache,
        metadata: TritonMetadata,
        spec: AttentionSpec,
    ) -> Tensor:
        """Normalise, turn and store in one kernel, then attend."""
        k_cache_BPNK, v_cache_BPNK = cache.keys.transpose(1, 2), cache.values.transpose(1, 2)
        slots_T = metadata.slot_mapping_T
        q_THK = prepare_and_store(qkv_TE, positions_T, preparation, spec, k_cache_BPNK, v_cache_BPNK, slots_T)
        return self._attend(q_THK, cache, metadata, spec)

    def _attend(self, q_THK: Tensor, cache: TritonCache, metadata: TritonMetadata, spec: AttentionSpec) -> Tensor:
        return paged_attention(
            q_THK,
            cache.keys.transpose(1, 2),
            cache.values.transpose(1, 2),
            metadata.block_table_RB,
            metadata.query_start_R1,
            metadata.seq_lens_R,
            spec.scale,
            spec.window,
            spec.soft_cap,
        )
