"""The attention backend ``triton``."""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.contracts.attention import AttentionSpec, StepTensors
from dovetail.contracts.ops import OpTable
from dovetail.errors import ConfigError
from dovetail_cuda.kernels.attention import FEW, attend, most_rows, processors, scale_and_cap, tile
from dovetail_cuda.kernels.prefixes import SharedPrefixes, attend_prefixes, grouping, shared_tokens
from dovetail_cuda.kernels.prompt_support import takes_prompts
from dovetail_cuda.kernels.prompt_tiles import prompt_tiles
from dovetail_cuda.paged import PagedAttention, PagedCache, PagedMetadata

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TritonAttention(PagedAttention):
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
        super().__init__(device, kv_dtype, block_size)

    def build_metadata(self, step: StepTensors, group: int) -> PagedMetadata:
        """References only: nothing is launched."""
        return PagedMetadata(
            block_table_RB=step.block_tables[group],
            query_start_R1=step.query_start_R1,
            seq_lens_R=step.seq_lens_R,
            slot_mapping_T=step.slot_mapping[group],
        )

    def attend(self, q_THK: Tensor, cache: PagedCache, metadata: PagedMetadata, spec: AttentionSpec) -> Tensor:
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

    def _attend_prompts(self, q_THK: Tensor, cache: PagedCache, metadata: PagedMetadata, spec: AttentionSpec) -> Tensor:
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
        self, q_THK: Tensor, cache: PagedCache, metadata: PagedMetadata, spec: AttentionSpec
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
