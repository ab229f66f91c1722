"""How many KV blocks the device gets, and the storage that KV groups share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from dovetail.config import EngineConfig
from dovetail.contracts.attention import AttentionBackend, AttentionSpec, KVCache
from dovetail.contracts.executor import KVGroup
from dovetail.contracts.platform import MemoryInfo
from dovetail.errors import ConfigError
from dovetail.kv.groups import group_layers, most_pages
from dovetail.sizes import gib_up, size

SHARED = 0.25
"""Without ``--kv-cache-memory`` the cache takes at most this share of the host's free memory, which others need too."""
DEDICATED = 0.9
"""Default of ``--memory-fraction``."""
MOST_BLOCKS = 1 << 20
"""More than ``--memory-fraction`` is ever honoured with, unless full contexts need them: the host lists all blocks."""


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

    By default they hold ``max_num_seqs`` full contexts, of which each group keeps what its window shows, as far as the
    memory goes: what ``--memory-fraction`` leaves of a device's own beside weights and the largest step, or a share of
    what is free on the host. Who sets ``--memory-fraction`` gets all of it.

    Args:
        memory: after the largest step, where the platform counts its peak.

    Raises:
        ConfigError: not even one request of ``max_model_len`` fits; the message says how much is missing.
    """
    per_request = blocks_per_request(config, groups)
    budget = _budget(config, memory)
    needed = (per_request + 1) * bytes_per_block
    if budget < needed:
        raise ConfigError(_shortage(config, memory, budget, needed))
    blocks = budget // bytes_per_block
    if config.kv_cache_memory is not None:
        return blocks
    full_contexts = _full_contexts(config, groups)
    return min(blocks, full_contexts if config.memory_fraction is None else max(full_contexts, MOST_BLOCKS))


def trial_blocks(config: EngineConfig, bytes_per_block: int, groups: Sequence[KVGroup], memory: MemoryInfo) -> int:
    """Blocks of the cache over which the largest step shows what it takes, where each size of cache is compiled for.

    As many as there will be, if that is known whatever the step takes, since half of the memory suffices for them: so
    the step is not compiled again. Else the null block alone.

    Args:
        memory: before that step.

    Raises:
        ConfigError: as :func:`num_blocks`.
    """
    if config.memory_fraction is not None:
        return 1
    asked = config.kv_cache_memory
    blocks = _full_contexts(config, groups) if asked is None else asked // bytes_per_block
    fits = blocks * bytes_per_block <= min(_budget(config, memory), _room(memory) // 2)
    return max(blocks, 1) if fits else 1


def without(memory: MemoryInfo, cache: int) -> MemoryInfo:
    """As it were without a cache of so many bytes."""
    peak = None if memory.peak is None else memory.peak - cache
    return replace(memory, available=memory.available + cache, held=memory.held - cache, peak=peak)


def _full_contexts(config: EngineConfig, groups: Sequence[KVGroup]) -> int:
    """Blocks that as many requests as may run hold, and the null block."""
    return config.max_num_seqs * blocks_per_request(config, groups) + 1


def _budget(config: EngineConfig, memory: MemoryInfo) -> int:
    """Bytes for the cache, which may be too few, or below zero."""
    room = _room(memory)
    if config.kv_cache_memory is not None:
        if config.kv_cache_memory > room:
            step = "" if memory.peak is None else " beside the largest step"
            raise ConfigError(
                f"--kv-cache-memory asks for {size(config.kv_cache_memory)}, but {size(max(0, room))} are free on the "
                f"device{step}. Lower it, or free memory."
            )
        return config.kv_cache_memory
    if memory.dedicated:
        return min(int(memory.total * _fraction(config)) - _used(memory), room)
    if config.memory_fraction is not None:
        raise ConfigError(
            f"--memory-fraction is for devices with memory of their own, and {config.platform.name!r} shares the "
            "host's. Say with --kv-cache-memory how much the KV cache may take."
        )
    return int(room * SHARED)


def _fraction(config: EngineConfig) -> float:
    return DEDICATED if config.memory_fraction is None else config.memory_fraction


def _used(memory: MemoryInfo) -> int:
    """What counts against the engine's share. Where peaks are not counted, what others take does, too."""
    return memory.total - memory.available if memory.peak is None else memory.peak


def _room(memory: MemoryInfo) -> int:
    """What is free beside the largest step."""
    return memory.available - (0 if memory.peak is None else memory.peak - memory.held)


def _shortage(config: EngineConfig, memory: MemoryInfo, budget: int, needed: int) -> str:
    draft = "" if config.draft is None else ", the draft model's included"
    message = (
        f"One request of --max-model-len {config.max_model_len} needs {size(needed)} of KV cache{draft}, and the "
        f"cache has {size(max(0, budget))}, so {size(needed - budget)} are missing. "
    )
    if config.kv_cache_memory is not None or not memory.dedicated:
        return f"{message}Set --kv-cache-memory to {gib_up(needed)} or lower --max-model-len."
    used, fraction = _used(memory), _fraction(config)
    message += (
        f"--memory-fraction {fraction} of the device's {size(memory.total)} are {size(int(memory.total * fraction))}; "
        f"weights and the largest step take {size(used)}. "
    )
    enough = math.ceil((used + needed) / memory.total * 1000) / 1000
    if needed <= _room(memory) and enough <= 1:
        return f"{message}Set --memory-fraction to {enough}, or lower --max-model-len or --max-num-batched-tokens."
    return f"{message}Lower --max-model-len or --max-num-batched-tokens, quantize the weights, or free memory."


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
