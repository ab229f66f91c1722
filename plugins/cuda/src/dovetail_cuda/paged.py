"""What this plugin's attention backends have in common: the cache, how it is filled, and a step's tables."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dovetail.contracts.attention import AttentionBackend, AttentionSpec, Preparation
from dovetail_cuda.kernels.cache import write_kv
from dovetail_cuda.kernels.projection import prepare_and_store


@dataclass(frozen=True, kw_only=True, slots=True)
class PagedMetadata:
    """The step's own tables of one KV group. What layers derive from them, the first layer that needs it computes, in a
    captured graph too.
    """

    block_table_RB: Tensor
    query_start_R1: Tensor
    seq_lens_R: Tensor
    slot_mapping_T: Tensor
    derived: dict[Hashable, Tensor] = field(default_factory=dict)

    def once(self, key: Hashable, derive: Callable[[], Tensor]) -> Tensor:
        """What ``derive`` returns, which runs once per step and key."""
        if key not in self.derived:
            self.derived[key] = derive()
        return self.derived[key]


@dataclass(frozen=True, slots=True)
class PagedCache:
    """Keys and values of one layer, ``[B, N, P, K]`` each."""

    keys: Tensor
    values: Tensor


class PagedAttention(AttentionBackend):
    """One cache tensor each for keys and values, pages of a head contiguous; backends attend to it in their own way."""

    def __init__(self, device: torch.device, kv_dtype: torch.dtype, block_size: int, *, finite: bool = False) -> None:
        """``finite``: whatever a model computes, all numbers of the cache are finite, at every time."""
        self._device, self._kv_dtype, self._block_size, self._finite = device, kv_dtype, block_size, finite

    @abstractmethod
    def attend(self, q_THK: Tensor, cache: PagedCache, metadata: Any, spec: AttentionSpec) -> Tensor:
        """Attend to what is stored: ``[T, H × K]``."""
        ...

    def page_bytes(self, spec: AttentionSpec) -> int:
        """Keys and values of one block."""
        return 2 * self._block_size * spec.num_kv_heads * spec.head_size * self._kv_dtype.itemsize

    def allocate(self, spec: AttentionSpec, num_blocks: int) -> PagedCache:
        """Not initialised where what no query sees is not read."""
        shape = (num_blocks, spec.num_kv_heads, self._block_size, spec.head_size)
        make = torch.zeros if self._finite else torch.empty
        keys, values = (make(shape, dtype=self._kv_dtype, device=self._device) for _ in range(2))
        return PagedCache(keys, values)

    def forward(
        self,
        q_THK: Tensor,
        k_TNK: Tensor,
        v_TNK: Tensor,
        cache: PagedCache,
        metadata: PagedMetadata,
        spec: AttentionSpec,
    ) -> Tensor:
        """Store, then attend."""
        k_cache_BPNK, v_cache_BPNK = cache.keys.transpose(1, 2), cache.values.transpose(1, 2)
        write_kv(k_TNK, v_TNK, k_cache_BPNK, v_cache_BPNK, metadata.slot_mapping_T, self._finite)
        return self.attend(q_THK, cache, metadata, spec)

    def forward_projected(
        self,
        qkv_TE: Tensor,
        positions_T: Tensor,
        preparation: Preparation,
        cache: PagedCache,
        metadata: PagedMetadata,
        spec: AttentionSpec,
    ) -> Tensor:
        """Normalise, turn and store in one kernel, then attend."""
        k_cache_BPNK, v_cache_BPNK = cache.keys.transpose(1, 2), cache.values.transpose(1, 2)
        q_THK = prepare_and_store(
            qkv_TE,
            positions_T,
            preparation,
            spec,
            k_cache_BPNK,
            v_cache_BPNK,
            metadata.slot_mapping_T,
            finite=self._finite,
        )
        return self.attend(q_THK, cache, metadata, spec)
