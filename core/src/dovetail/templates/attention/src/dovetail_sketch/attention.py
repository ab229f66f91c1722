"""Attention of torch over gathered pages."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.contracts.attention import AttentionBackend, AttentionSpec, StepTensors
from dovetail.contracts.ops import OpTable
from dovetail.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Metadata:
    """One step: where tokens are stored, and per request its query tokens, its length and its pages."""

    blocks_T: Tensor
    offsets_T: Tensor
    requests: list[tuple[int, int, int, Tensor]]


class SketchAttention(AttentionBackend):
    """One tensor per layer: ``[blocks, keys and values, N, tokens per block, K]``."""

    def __init__(
        self, *, ops: OpTable, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype, block_size: int
    ) -> None:
        if kv_dtype != dtype:
            raise ConfigError(f"The cache holds {dtype}, not {kv_dtype}; leave out --kv-cache-dtype.")
        self._device, self._dtype, self._block_size = device, dtype, block_size

    def page_bytes(self, spec: AttentionSpec) -> int:
        return 2 * spec.num_kv_heads * self._block_size * spec.head_size * self._dtype.itemsize

    def allocate(self, spec: AttentionSpec, num_blocks: int) -> Tensor:
        shape = (num_blocks, 2, spec.num_kv_heads, self._block_size, spec.head_size)
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def build_metadata(self, step: StepTensors, group: int) -> Metadata:
        slots_T = step.slot_mapping[group]
        starts, lengths = step.query_start_R1.tolist(), step.seq_lens_R.tolist()
        requests = []
        for r, (start, end, length) in enumerate(zip(starts[:-1], starts[1:], lengths, strict=True)):
            if end > start:  # others are padding
                pages = -(-length // self._block_size)
                requests.append((start, end, length, step.block_tables[group][r, :pages]))
        return Metadata(slots_T // self._block_size, slots_T % self._block_size, requests)

    def forward(
        self, q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor, cache: Tensor, metadata: Metadata, spec: AttentionSpec
    ) -> Tensor:
        cache[metadata.blocks_T, 0, :, metadata.offsets_T] = k_TNK
        cache[metadata.blocks_T, 1, :, metadata.offsets_T] = v_TNK
        out_THK = torch.zeros_like(q_THK)
        for start, end, length, pages in metadata.requests:
            kv = cache[pages].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
            out = F.scaled_dot_product_attention(
                q_THK[start:end].transpose(0, 1).unsqueeze(0),
                kv[0].unsqueeze(0),
                kv[1].unsqueeze(0),
                attn_mask=self._visible(length, end - start, spec.window),
                scale=spec.scale,
                enable_gqa=True,
            )
            out_THK[start:end] = out[0].transpose(0, 1)
        return out_THK.flatten(1)

    def _visible(self, length: int, queries: int, window: int | None) -> Tensor:
        """``[queries, length]``: the last ``queries`` positions see what is before them, within the window."""
        keys_L = torch.arange(length, device=self._device)
        distance_TL = keys_L[length - queries :].unsqueeze(1) - keys_L
        return (distance_TL >= 0) & (distance_TL < (window or length))
