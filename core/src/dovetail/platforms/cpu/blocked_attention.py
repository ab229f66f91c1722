"""Attention in plain torch, tile by tile: no native code, any CPU, and KV pages in narrower dtypes than activations.

Queries are cut into tiles and keys into spans; all tiles of one size are computed together, one span after the other,
with an online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135), so that
memory does not grow with the context.

W: tiles, Q: queries per tile, L: keys of a span, G: query heads per key/value head; others as in
:mod:`dovetail.contracts`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dovetail.contracts.attention import AttentionBackend, AttentionSpec, StepTensors
from dovetail.contracts.ops import OpTable

TILES = (1, 8, 32)
"""Queries per tile: a decode, a few drafts, a prompt's chunk."""
SPAN = 256
"""Keys per step of the online softmax, rounded to whole pages."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of one size.

    Attributes:
        rows_WQ: row of each query in the step; 0 where there is none.
        positions_WQ: its position in the request; -1, which sees no key, where there is none.
        blocks_WB: pages of each tile's request.
        first, end: the keys that any of these queries may see are among ``first : end``.
    """

    rows_WQ: Tensor
    positions_WQ: Tensor
    blocks_WB: Tensor
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class BlockedMetadata:
    """One step of one KV group: where tokens are stored, and the tiles of every size in use."""

    blocks_T: Tensor
    offsets_T: Tensor
    tiles: tuple[Tiles, ...]


@dataclass(frozen=True, slots=True)
class BlockedCache:
    """Keys and values of one layer, ``[B, N, P, K]`` each."""

    keys: Tensor
    values: Tensor


class BlockedAttention(AttentionBackend):
    """Computes in float32 whatever the activations and the cache are stored in."""

    def __init__(
        self, *, ops: OpTable, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype, block_size: int
    ) -> None:
        self._device = device
        self._kv_dtype = kv_dtype
        self._limit = torch.finfo(kv_dtype).max
        self._block_size = block_size
        self._span_pages = max(1, SPAN // block_size)

    def page_bytes(self, spec: AttentionSpec) -> int:
        """Keys and values of one block."""
        return 2 * self._block_size * spec.num_kv_heads * spec.head_size * self._kv_dtype.itemsize

    def allocate(self, spec: AttentionSpec, num_blocks: int) -> BlockedCache:
        """Zeros: a key that is masked is still multiplied by 0."""
        shape = (num_blocks, spec.num_kv_heads, self._block_size, spec.head_size)
        return BlockedCache(
            torch.zeros(shape, dtype=self._kv_dtype, device=self._device),
            torch.zeros(shape, dtype=self._kv_dtype, device=self._device),
        )

    def build_metadata(self, step: StepTensors, group: int) -> BlockedMetadata:
        """Cut the step's queries into tiles."""
        slots_T = step.slot_mapping[group]
        starts_R1 = step.query_start_R1.numpy().astype(np.int64)
        counts_R = np.diff(starts_R1)
        sizes_R = np.array(TILES)[np.searchsorted(TILES, counts_R.clip(max=TILES[-1]))]
        tiles = (
            self._tiles(step, group, np.flatnonzero((sizes_R == size) & (counts_R > 0)), starts_R1, size)
            for size in TILES
        )
        return BlockedMetadata(
            slots_T // self._block_size, slots_T % self._block_size, tuple(t for t in tiles if len(t.rows_WQ))
        )

    def _tiles(self, step: StepTensors, group: int, requests: np.ndarray, starts_R1: np.ndarray, size: int) -> Tiles:
        counts = starts_R1[requests + 1] - starts_R1[requests]
        per_request = -(-counts // size)
        request_W = np.repeat(requests, per_request)
        tile_W = np.arange(len(request_W)) - np.repeat(per_request.cumsum() - per_request, per_request)
        offset_WQ = (tile_W * size)[:, None] + np.arange(size)
        real_WQ = offset_WQ < np.repeat(counts, per_request)[:, None]
        lengths_W = step.seq_lens_R.numpy()[request_W].astype(np.int64)
        done_WQ = (lengths_W - np.repeat(counts, per_request))[:, None]
        positions_WQ = np.where(real_WQ, done_WQ + offset_WQ, -1)
        return Tiles(
            rows_WQ=torch.from_numpy(np.where(real_WQ, starts_R1[request_W][:, None] + offset_WQ, 0)),
            positions_WQ=torch.from_numpy(positions_WQ),
            blocks_WB=step.block_tables[group][torch.from_numpy(request_W)].long(),
            first=int(positions_WQ[:, 0].min()) if len(request_W) else 0,
            end=int(positions_WQ.max(initial=-1)) + 1,
        )

    def forward(
        self,
        q_THK: Tensor,
        k_TNK: Tensor,
        v_TNK: Tensor,
        cache: BlockedCache,
        metadata: BlockedMetadata,
        spec: AttentionSpec,
    ) -> Tensor:
        """Store everything, then attend tile by tile."""
        place = (metadata.blocks_T, slice(None), metadata.offsets_T)
        cache.keys[place] = self._stored(k_TNK)
        cache.values[place] = self._stored(v_TNK)
        out_THK = torch.zeros_like(q_THK)
        for tiles in metadata.tiles:
            out_WQHK = self._attend(q_THK, cache, tiles, spec)
            real_WQ = tiles.positions_WQ >= 0
            out_THK[tiles.rows_WQ[real_WQ]] = out_WQHK[real_WQ].to(q_THK.dtype)
        return out_THK.flatten(1)

    def _stored(self, x_TNK: Tensor) -> Tensor:
        """In the cache's dtype; a value beyond its range becomes the largest one rather than infinite."""
        if x_TNK.dtype == self._kv_dtype:
            return x_TNK
        return x_TNK.float().clamp(-self._limit, self._limit).to(self._kv_dtype)

    def _attend(self, q_THK: Tensor, cache: BlockedCache, tiles: Tiles, spec: AttentionSpec) -> Tensor:
        """``[W, Q, H, K]`` in float32."""
        num_tiles, queries = tiles.rows_WQ.shape
        shape = (num_tiles, queries, spec.num_kv_heads, -1, spec.head_size)
        q_WNGQK = q_THK[tiles.rows_WQ].float().view(shape).permute(0, 2, 3, 1, 4) * spec.scale
        sums_WNGQK = torch.zeros_like(q_WNGQK)
        totals_WNGQ1 = torch.zeros_like(q_WNGQK[..., :1])
        peaks_WNGQ1 = torch.full_like(totals_WNGQ1, -torch.inf)
        first_key = 0 if spec.window is None else max(0, tiles.first - spec.window + 1)
        span = self._span_pages * self._block_size
        for start in range(first_key // span * span, tiles.end, span):
            pages = slice(start // self._block_size, start // self._block_size + self._span_pages)
            blocks_WB = tiles.blocks_WB[:, pages]
            k_WNLK, v_WNLK = self._read(cache.keys, blocks_WB), self._read(cache.values, blocks_WB)
            # What a block's former owner left is multiplied by 0, and must be finite for that.
            keys_L = torch.arange(start, start + v_WNLK.shape[2])
            v_WNLK.masked_fill_((keys_L > tiles.positions_WQ.amax(1, keepdim=True))[:, None, :, None], 0.0)
            scores_WNGQL = q_WNGQK @ k_WNLK.unsqueeze(2).mT
            if spec.soft_cap is not None:
                scores_WNGQL = spec.soft_cap * torch.tanh(scores_WNGQL / spec.soft_cap)
            hidden_WQL = ~_visible(tiles.positions_WQ, start, k_WNLK.shape[2], spec.window)
            scores_WNGQL.masked_fill_(hidden_WQL[:, None, None], -torch.inf)
            before_WNGQ1 = peaks_WNGQ1
            peaks_WNGQ1 = torch.maximum(before_WNGQ1, scores_WNGQL.amax(-1, keepdim=True))
            finite_WNGQ1 = peaks_WNGQ1.nan_to_num(neginf=0.0)  # nothing visible yet: every weight is exp(-inf)
            weights_WNGQL = (scores_WNGQL - finite_WNGQ1).exp_()
            shrink_WNGQ1 = (before_WNGQ1 - finite_WNGQ1).exp_()
            totals_WNGQ1 = totals_WNGQ1 * shrink_WNGQ1 + weights_WNGQL.sum(-1, keepdim=True)
            sums_WNGQK = sums_WNGQK * shrink_WNGQ1 + weights_WNGQL @ v_WNLK.unsqueeze(2)
        # A query sees at least itself, so only absent queries have no weight.
        out_WNGQK = sums_WNGQK / totals_WNGQ1.clamp(min=torch.finfo(torch.float32).tiny)
        return out_WNGQK.permute(0, 3, 1, 2, 4).flatten(2, 3)

    @staticmethod
    def _read(cache_BNPK: Tensor, blocks_WB: Tensor) -> Tensor:
        """A span of pages as ``[W, N, L, K]`` in float32."""
        return cache_BNPK[blocks_WB].transpose(1, 2).flatten(2, 3).float()


def _visible(positions_WQ: Tensor, start: int, count: int, window: int | None) -> Tensor:
    """Which of the keys ``start : start + count`` each query sees, bool ``[W, Q, L]``."""
    keys_L = torch.arange(start, start + count, device=positions_WQ.device)
    distance_WQL = positions_WQ.unsqueeze(2) - keys_L
    visible_WQL = distance_WQL >= 0
    return visible_WQL if window is None else visible_WQL & (distance_WQL < window)
