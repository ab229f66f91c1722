"""Attention on the abacus. H: query heads, N: key/value heads, G: query heads of one of them, P: tokens of a page."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.contracts.attention import AttentionBackend, AttentionSpec, StepTensors
from dovetail.contracts.ops import OpTable
from dovetail.errors import ConfigError
from dovetail_abacus.device import kernel

KEYS, VALUES = 0, 1


@dataclass(frozen=True, slots=True)
class Metadata:
    """One step's tables, token by token.

    Attributes:
        table_TB: block of each page of the token's request.
        positions_T: of each token in its request.
        slots_T: where its keys and values go.
        pages: of the longest request.
    """

    table_TB: Tensor
    positions_T: Tensor
    slots_T: Tensor
    pages: int


class AbacusAttention(AttentionBackend):
    """One tensor per layer, ``[blocks, N, keys and values, K, P]``: the tokens of a page are beads of one rod.

    Every token attends by itself, so that no shape depends on how tokens are spread over requests.
    """

    def __init__(
        self, *, ops: OpTable, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype, block_size: int
    ) -> None:
        if kv_dtype != dtype:
            raise ConfigError(f"abacus stores keys and values in {dtype}, not {kv_dtype}; leave out --kv-cache-dtype.")
        self._device, self._dtype, self._block_size = device, dtype, block_size

    def page_bytes(self, spec: AttentionSpec) -> int:
        """Keys and values, without padding."""
        return 2 * spec.num_kv_heads * self._block_size * spec.head_size * self._dtype.itemsize

    def allocate(self, spec: AttentionSpec, num_blocks: int) -> Tensor:
        """Zeroed."""
        shape = (num_blocks, spec.num_kv_heads, 2, spec.head_size, self._block_size)
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def build_metadata(self, step: StepTensors, group: int) -> Metadata:
        """Repeat each request's table for its tokens. Padding tokens take that of the last request, and see one key."""
        tokens_T = torch.arange(len(step.positions_T), dtype=torch.int32, device=self._device)
        requests_T = torch.searchsorted(step.query_start_R1[1:].contiguous(), tokens_T, right=True)
        table_RB = step.block_tables[group]
        table_TB = table_RB[requests_T.clamp(max=len(table_RB) - 1)]
        pages = min(table_RB.shape[1], max(1, -(-step.max_seq_len // self._block_size)))
        return Metadata(table_TB, step.positions_T, step.slot_mapping[group], pages)

    def forward(
        self, q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor, cache: Tensor, metadata: Metadata, spec: AttentionSpec
    ) -> Tensor:
        """Two kernels: store, attend."""
        m = metadata
        _store(k_TNK, v_TNK, cache, m.slots_T)
        attended: Tensor = _attend(
            q_THK, cache, m.table_TB, m.positions_T, m.pages, spec.scale, spec.window, spec.soft_cap
        )
        return attended


@kernel
def _store(k_TNK: Tensor, v_TNK: Tensor, cache: Tensor, slots_T: Tensor) -> None:
    block_size = cache.shape[-1]
    blocks_T, offsets_T = slots_T // block_size, slots_T % block_size
    cache[blocks_T, :, KEYS, :, offsets_T] = k_TNK
    cache[blocks_T, :, VALUES, :, offsets_T] = v_TNK


@kernel
def _attend(
    q_THK: Tensor,
    cache: Tensor,
    table_TB: Tensor,
    positions_T: Tensor,
    pages: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    """Scores page by page, one softmax, values page by page; sums in float32."""
    _, kv_heads, _, head_size, block_size = cache.shape
    q_TNGK = q_THK.float().view(len(q_THK), kv_heads, -1, head_size) * scale
    distance_TL = positions_T.unsqueeze(1) - torch.arange(pages * block_size)
    hidden_TL = (distance_TL < 0) if window is None else (distance_TL < 0) | (distance_TL >= window)
    hidden = [hidden_TP[:, None, None] for hidden_TP in hidden_TL.split(block_size, dim=-1)]
    scores = []
    for page, hidden_T11P in enumerate(hidden):
        scores_TNGP = q_TNGK @ cache[table_TB[:, page], :, KEYS].float()
        if soft_cap is not None:
            scores_TNGP = soft_cap * torch.tanh(scores_TNGP / soft_cap)
        scores.append(scores_TNGP.masked_fill(hidden_T11P, -torch.inf))
    weights_TNGL = torch.cat(scores, dim=-1).softmax(-1)
    out_TNGK = torch.zeros_like(q_TNGK)
    for page, weights_TNGP in enumerate(weights_TNGL.split(block_size, dim=-1)):
        # A weight of 0 does not hide a value that is not finite, which a block's former owner may have left.
        values_TNKP = cache[table_TB[:, page], :, VALUES].float().masked_fill(hidden[page], 0.0)
        out_TNGK += weights_TNGP @ values_TNKP.transpose(-1, -2)
    return out_TNGK.flatten(1).to(q_THK.dtype)
