"""AttentionBackend: the layout of the KV cache, and attention over it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dovetail.contracts.ops import OpTable

KVCache = Any
"""One layer's cache, in the backend's own layout. The core never looks inside."""

Metadata = Any
"""What the backend precomputes once per step and KV group, shared by that group's layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec:
    """One attention layer's shape and behaviour.

    Attributes:
        num_heads, num_kv_heads: query heads and key/value heads; the former is a multiple of the latter.
        head_size: elements per head.
        scale: factor on q·k before the softmax.
        window: each query sees itself and the ``window - 1`` tokens before it; None sees everything before.
        soft_cap: logits become ``cap × tanh(logits / cap)``; None leaves them.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    window: int | None = None
    soft_cap: float | None = None


@dataclass(kw_only=True, slots=True)
class StepTensors:
    """One step's tables, on the device. A ragged batch: any mix of prefill chunks, decodes and draft verification.

    Attributes:
        token_ids_T: int64 tokens to compute.
        positions_T: int64 position of each token in its request.
        query_start_R1: int32 ``[R + 1]``: request r computes tokens ``query_start[r] : query_start[r + 1]``.
        seq_lens_R: int32 tokens of each request after this step; its last query token sits at ``seq_len - 1``.
        block_tables: per KV group, int32 ``[R, B]``: block of each page; ``NULL_BLOCK`` where there is none.
        slot_mapping: per KV group, int64 ``[T]``: ``block × block_size + offset`` where each token's KV is stored.
            Padding tokens point into ``NULL_BLOCK``.
        logits_rows_S: int64 rows of the hidden states that need logits.
        max_query_len, max_seq_len: host integers, at least the largest of the step.

    Padding requests have no tokens (equal starts) and ``seq_len`` 0.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    query_start_R1: Tensor
    seq_lens_R: Tensor
    block_tables: Sequence[Tensor]
    slot_mapping: Sequence[Tensor]
    logits_rows_S: Tensor
    max_query_len: int
    max_seq_len: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Preparation:
    """What a layer does to its projection before attention: optional norms of queries and keys, then rotary positions.

    Attributes:
        cos_sin_PK: as ``ops.rotary`` takes it: float32 ``[positions, rotary_dim]``, cosines, then sines.
        norm_weights_K: ``[K]`` each, by which every head's queries and keys are normalised, in the activation dtype or
            float32; None does not normalise them.
        eps: of these norms.
        ops: the engine's operations.
    """

    cos_sin_PK: Tensor
    norm_weights_K: tuple[Tensor, Tensor] | None = None
    eps: float = 0.0
    ops: OpTable

    def heads(self, qkv_TE: Tensor, positions_T: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
        """The projection as queries, keys and values for attention, by operations of the table: what a backend that
        does it in one go must agree with. Results are rounded to the activation dtype after each operation.

        Args:
            qkv_TE: ``[T, (H + 2 N) × K]``: queries, keys, values. Its content is unspecified afterwards.
            positions_T: int64 row of ``cos_sin_PK`` for each token.
            spec: of the layer.
        """
        counts = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
        q_THK, k_TNK, v_TNK = qkv_TE.view(-1, sum(counts), spec.head_size).split_with_sizes(counts, 1)
        if self.norm_weights_K is not None:
            q_weight_K, k_weight_K = self.norm_weights_K
            rms_norm = self.ops.rms_norm
            q_THK, k_TNK = rms_norm(q_THK, q_weight_K, self.eps), rms_norm(k_TNK, k_weight_K, self.eps)
        q_THK, k_TNK = self.ops.rotary(q_THK, k_TNK, positions_T, self.cos_sin_PK)
        return q_THK, k_TNK, v_TNK


class AttentionBackend(ABC):
    """Attention of one engine. The manifest declares what it supports; the resolver has checked it before."""

    @abstractmethod
    def __init__(
        self, *, ops: OpTable, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype, block_size: int
    ) -> None:
        """Prepare for activations of ``dtype`` and a cache of ``kv_dtype`` with ``block_size`` tokens per block.

        Phase: load. Order: 1. Times: once. May raise: ConfigError.

        Raises:
            ConfigError: the combination cannot run here; the message says why and what would.
        """
        ...

    @abstractmethod
    def page_bytes(self, spec: AttentionSpec) -> int:
        """Bytes of one block of one layer.

        Phase: load. Order: 3. Times: per layer. May raise: ConfigError.
        """
        ...

    @abstractmethod
    def allocate(self, spec: AttentionSpec, num_blocks: int) -> KVCache:
        """One layer's cache of ``num_blocks`` blocks. Memory need not be touched before use.

        Phase: load. Order: 2. Times: for the start-up checks, then per layer of the largest group.
        May raise: ConfigError.
        """
        ...

    @abstractmethod
    def build_metadata(self, step: StepTensors, group: int) -> Metadata:
        """What the layers of KV group ``group`` share in this step. Runs once per step, outside the compiled step.

        A platform that captures or traces steps makes a program for each set of values that are no tensors in it, so
        with static shapes those should follow from shapes. It looks into dataclasses, tuples, lists and mappings.

        Phase: step. Order: 1. Times: per KV group. May raise: nothing.
        """
        ...

    @abstractmethod
    def forward(
        self, q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor, cache: KVCache, metadata: Metadata, spec: AttentionSpec
    ) -> Tensor:
        """Store ``k`` and ``v`` of all tokens of this step, then attend. Causal within each request.

        Phase: step. Order: 3. Times: per layer. May raise: nothing.

        A request may see pages that another request of the same step fills, so nothing is read before all is stored.

        Returns:
            ``[T, H × K]`` in the activation dtype; rows of padding tokens are unspecified but finite.
        """
        ...

    def forward_projected(
        self,
        qkv_TE: Tensor,
        positions_T: Tensor,
        preparation: Preparation,
        cache: KVCache,
        metadata: Metadata,
        spec: AttentionSpec,
    ) -> Tensor:
        """:meth:`forward` of a layer's projection, which is still to be prepared.

        Phase: step. Order: 4. Times: per layer that leaves its preparation to the backend. May raise: nothing.

        Override it where one kernel can normalise, rotate and store. The default runs the operations one by one.

        Args:
            qkv_TE: ``[T, (H + 2 N) × K]`` in the activation dtype: queries, keys, values; rows may be strided. It is
                the backend's to overwrite.
            positions_T: int64 row of the preparation's table for each token.

        Returns:
            As :meth:`forward`, of what :meth:`Preparation.heads` gives.
        """
        return self.forward(*preparation.heads(qkv_TE, positions_T, spec), cache, metadata, spec)
