"""How many KV blocks the device gets, and the storage that KV groups share."""

from __future__ import annotations

from collections.abc import Sequence

from dovetail.config import EngineConfig
from dovetail.contracts.attention import AttentionBackend, AttentionSpec, KVCache
from dovetail.contracts.executor import KVGroup
from dovetail.contracts.platform import MemoryInfo
from dovetail.errors import ConfigError
from dovetail.kv.groups import group_layers, most_pages
from dovetail.sizes import gib_up, size

SHARED, DEDICATED = 0.25, 0.9
"""Without ``--kv-cache-memory`` the cache takes at most this share of the free memory: other programs need the host's,
and steps need some of a device's own."""


def groups_of(specs: Sequence[AttentionSpec]) -> tuple[KVGroup, ...]:
    """The KV groups of a model's layers."""
    return group_layers([(spec.window, spec.num_kv_heads, spec.head_size) for spec in specs])


def block_bytes(specs: Sequence[AttentionSpec], groups: Sequence[KVGroup], backend: AttentionBackend) -> int:
    """Bytes of one block: the group with the most layers decides, since every group draws from one pool.

    Raises:
        ConfigError: layers whose pages differ in size; they could not share blocks.
    """
    sizes = {backend.page_bytes(spec) for spec in specs}
    if len(sizes) > 1:
        raise ConfigError(f"The layers of this model need KV pages of {sorted(sizes)} bytes; they must be equal.")
    return sizes.pop() * max(len(group.layers) for group in groups)


def blocks_per_request(config: EngineConfig, groups: Sequence[KVGroup]) -> int:
    """Most blocks that one request of ``max_model_len`` holds at once."""
    step = min(config.max_num_batched_tokens, config.max_model_len)
    return sum(most_pages(group.window, config.max_model_len, step, config.block_size) for group in groups)


def num_blocks(config: EngineConfig, bytes_per_block: int, groups: Sequence[KVGroup], memory: MemoryInfo) -> int:
    """Blocks of the pool, the null block included.

    The default holds ``max_num_seqs`` full contexts, of which each group keeps what its window shows, within a share
    of the available memory.

    Raises:
        ConfigError: not even one request of ``max_model_len`` fits; the message says how much is missing.
    """
    per_request = blocks_per_request(config, groups)
    wanted = config.max_num_seqs * per_request + 1
    available = memory.available
    if config.kv_cache_memory is None:
        budget = min(wanted * bytes_per_block, int(available * (DEDICATED if memory.dedicated else SHARED)))
    else:
        budget = config.kv_cache_memory
        if budget > available:
            raise ConfigError(
                f"--kv-cache-memory asks for {size(budget)}, but {size(available)} are free on the device. Lower it, "
                "or free memory."
            )
    blocks = budget // bytes_per_block
    if blocks < per_request + 1:
        needed = (per_request + 1) * bytes_per_block
        draft = "" if config.draft is None else ", the draft model's included"
        raise ConfigError(
            f"One request of --max-model-len {config.max_model_len} needs {size(needed)} of KV cache{draft}, and the "
            f"cache has {size(budget)}, so {size(needed - budget)} are missing. Set --kv-cache-memory to "
            f"{gib_up(needed)} or lower --max-model-len."
        )
    return blocks if config.kv_cache_memory is not None else min(blocks, wanted)


def allocate(
    specs: Sequence[AttentionSpec], groups: Sequence[KVGroup], backend: AttentionBackend, blocks: int
) -> list[KVCache]:
    """One cache per layer. The j-th layers of all groups share storage: a block belongs to one group at a time."""
    depth = max(len(group.layers) for group in groups)
    widest = max(groups, key=lambda group: len(group.layers))
    storage = [backend.allocate(specs[widest.layers[j]], blocks) for j in range(depth)]
    caches: list[KVCache] = [None] * len(specs)
    for group in groups:
        for j, layer in enumerate(group.layers):
            caches[layer] = storage[j]
    return caches
