"""The attention backend ``triton``: one cache tensor each for keys and values, pages of a head contiguous."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dovetail.contracts.attention import AttentionBackend, AttentionSpec, Preparation, StepTensors
from dovetail.contracts.ops import OpTable
from dovetail.errors import ConfigError
from dovetail_cuda.kernels.attention import FEW, attend, most_rows, processors, scale_and_cap, tile
from dovetail_cuda.kernels.cache import write_kv
from dovetail_cuda.kernels.prefixes import SharedPrefixes, attend_prefixes, grouping, shared_tokens
from dovetail_cuda.kernels.projection import prepare_and_store
from dovetail_cuda.kernels.prompt_support import takes_prompts
from dovetail_cuda.kernels.prompt_tiles import prompt_tiles

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class TritonMetadata:
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
class TritonCache:
    """Keys and values of one layer, ``[B, N, P, K]`` each."""

    keys: Tensor
    values: Tensor


class TritonAttention(AttentionBackend):
    """Which kernels a step launches follows from its size; nothing depends on values on the host."""

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
        return self.attend(q_THK, cache, metadata, spec)

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
        return self.attend(q_THK, cache, metadata, spec)

    def attend(self, q_THK: Tensor, cache: TritonCache, metadata: TritonMetadata, spec: AttentionSpec) -> Tensor:
        """Attend to what is stored, by the kernels that suit the step's size."""
        if len(q_THK) > FEW and takes_prompts(q_THK, cache.keys, spec.scale, spec.window, spec.soft_cap):
            return self._attend_prompts(q_THK, cache, metadata, spec)
        table_RB, lengths_R, num_processors = metadata.block_table_RB, metadata.seq_lens_R, processors(self._device)
        group, context = spec.num_heads // spec.num_kv_heads, table_RB.shape[1] * self._block_size
        size, itemsize = spec.head_size, q_THK.element_size()
        return attend(
            q_THK,
            cache.keys.transpose(1, 2),
            cache.values.transpose(1, 2),
            table_RB,
            metadata.query_start_R1,
            lengths_R,
            spec.scale,
            spec.window,
            spec.soft_cap,
            tile(len(q_THK), len(lengths_R), spec.num_kv_heads, group, size, context, itemsize, num_processors),
            self._prefixes(q_THK, cache, metadata, spec),
        )

    def _attend_prompts(
        self, q_THK: Tensor, cache: TritonCache, metadata: TritonMetadata, spec: AttentionSpec
    ) -> Tensor:
        from dovetail_cuda.kernels.prompts import ROWS, attend_prompts

        queries, starts_R1, lengths_R = (
            ROWS * spec.num_kv_heads // spec.num_heads,
            metadata.query_start_R1,
            metadata.seq_lens_R,
        )
        tiles = metadata.once(("tiles", queries), lambda: prompt_tiles(starts_R1, lengths_R, len(q_THK), queries))
        table_RB, num_processors = metadata.block_table_RB, processors(self._device)
        return attend_prompts(q_THK, cache.keys, cache.values, table_RB, tiles, spec.scale, num_processors)

    def _prefixes(
        self, q_THK: Tensor, cache: TritonCache, metadata: TritonMetadata, spec: AttentionSpec
    ) -> SharedPrefixes | None:
        """What comes of the keys that requests share, if the step may hold enough of them."""
        table_RB, starts_R1, lengths_R = metadata.block_table_RB, metadata.query_start_R1, metadata.seq_lens_R
        group, rows = spec.num_heads // spec.num_kv_heads, most_rows(spec.head_size, q_THK.element_size())
        grouped = grouping(len(lengths_R), spec.num_kv_heads, group, rows, processors(self._device))
        if spec.window is not None or len(q_THK) > FEW or grouped is None:
            return None
        tokens_R = metadata.once(
            ("shared", grouped.requests),
            lambda: shared_tokens(table_RB, starts_R1, lengths_R, self._block_size, grouped.requests),
        )
        return attend_prefixes(
            q_THK,
            cache.keys.transpose(1, 2),
            cache.values.transpose(1, 2),
            table_RB,
            starts_R1,
            tokens_R,
            *scale_and_cap(spec.scale, spec.soft_cap),
            spec.soft_cap is not None,
            grouped,
        )
