"""BoundAttention: attention as a model's layers reach it within one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from dovetail.contracts.attention import AttentionBackend, AttentionSpec, KVCache, Metadata, Preparation


class BoundAttention:
    """The :class:`~dovetail.contracts.model.ProjectedAttention` of an engine's step.

    Args:
        caches, specs: one per layer.
        metadata: of this step, one per KV group.
        group_of: the KV group of each layer.
        wanted_S: the rows whose hidden states are read after the last layer; None: all of them.
    """

    __slots__ = (
        "_arguments",
        "_caches",
        "_forward",
        "_forward_projected",
        "_group_of",
        "_metadata",
        "_specs",
        "rows_S",
    )

    def __init__(
        self,
        backend: AttentionBackend,
        caches: Sequence[KVCache],
        metadata: Sequence[Metadata],
        specs: Sequence[AttentionSpec],
        group_of: Mapping[int, int],
        wanted_S: Tensor | None = None,
    ) -> None:
        self.rows_S: Tensor | None = None
        self._arguments = (backend, caches, metadata, specs, group_of), wanted_S
        self._forward, self._forward_projected = backend.forward, backend.forward_projected
        self._caches, self._metadata, self._specs, self._group_of = caches, metadata, specs, group_of

    def last(self) -> BoundAttention:
        """With the rows that are wanted."""
        arguments, wanted_S = self._arguments
        form = BoundAttention(*arguments)
        form.rows_S = wanted_S
        return form

    def __call__(self, layer: int, q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor) -> Tensor:
        """Store and attend."""
        metadata = self._metadata[self._group_of[layer]]
        return self._forward(q_THK, k_TNK, v_TNK, self._caches[layer], metadata, self._specs[layer])

    def projected(self, layer: int, qkv_TE: Tensor, positions_T: Tensor, preparation: Preparation) -> Tensor:
        """Prepare, store and attend."""
        metadata, spec = self._metadata[self._group_of[layer]], self._specs[layer]
        return self._forward_projected(qkv_TE, positions_T, preparation, self._caches[layer], metadata, spec)
