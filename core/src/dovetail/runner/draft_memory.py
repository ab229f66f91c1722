"""The KV cache of a draft model: it holds as many full contexts as the engine's own, out of the same memory."""

from __future__ import annotations

from collections.abc import Sequence

from dovetail.contracts.attention import AttentionSpec
from dovetail.contracts.executor import KVGroup
from dovetail.runner.kv_memory import blocks_per_request
from dovetail.runner.loaded_model import LoadedModel


def draft_groups(specs: Sequence[AttentionSpec]) -> tuple[KVGroup, ...]:
    """All layers as one group, which keeps every page; each layer's attention still masks by its own window."""
    return (KVGroup(layers=tuple(range(len(specs)))),)


def bytes_beside_block(draft: LoadedModel, groups: Sequence[KVGroup]) -> int:
    """Bytes of the draft's cache per block of the engine's, whose groups are given."""
    own = draft_groups(draft.facts.attention)
    total = draft.block_bytes(own) * blocks_per_request(draft.config, own)
    return -(-total // blocks_per_request(draft.config, groups))


def draft_blocks(draft: LoadedModel, groups: Sequence[KVGroup], blocks: int) -> int:
    """Blocks of the draft's cache beside ``blocks`` of the engine's, the null blocks included.

    Where the engine's cache holds a request of any length, so does the draft's.
    """
    own = blocks_per_request(draft.config, draft_groups(draft.facts.attention))
    return (blocks - 1) * own // blocks_per_request(draft.config, groups) + 1


def draft_bytes(draft: LoadedModel, groups: Sequence[KVGroup], blocks: int) -> int:
    """Of the draft's cache beside ``blocks`` of the engine's."""
    return draft_blocks(draft, groups, blocks) * draft.block_bytes(draft_groups(draft.facts.attention))
