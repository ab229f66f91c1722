"""The KV cache of a draft model: as many tokens as the engine's own, out of the same memory."""

from __future__ import annotations

from collections.abc import Sequence

from dovetail.config import EngineConfig
from dovetail.contracts.executor import KVGroup
from dovetail.errors import ConfigError
from dovetail.runner.loaded_model import LoadedModel


def draft_groups(draft: LoadedModel) -> tuple[KVGroup, ...]:
    """All layers as one group, which keeps every page; each layer's attention still masks by its own window."""
    return (KVGroup(layers=tuple(range(len(draft.facts.attention)))),)


def bytes_beside_block(draft: LoadedModel, groups: Sequence[KVGroup]) -> int:
    """Bytes of the draft's cache per block of the engine's, which holds a page of each of its groups."""
    return -(-draft.block_bytes(draft_groups(draft)) // len(groups))


def draft_blocks(config: EngineConfig, blocks: int, groups: Sequence[KVGroup]) -> int:
    """Blocks of the draft's cache, the null block included, beside ``blocks`` of the engine's.

    Raises:
        ConfigError: it could not hold one request of ``max_model_len``.
    """
    own = (blocks - 1) // len(groups) + 1
    needed = -(-config.max_model_len // config.block_size) + 1
    if own < needed:
        raise ConfigError(
            f"The draft model's KV cache gets {own} blocks, and one request of --max-model-len {config.max_model_len} "
            f"needs {needed}. Raise --kv-cache-memory, lower --max-model-len, or leave out --speculative-config."
        )
    return own
