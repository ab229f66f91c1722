"""How many KV blocks the device gets."""

from __future__ import annotations

import pytest
import torch

from dovetail.contracts.attention import AttentionSpec
from dovetail.contracts.executor import KVGroup
from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import MemoryInfo
from dovetail.errors import ConfigError
from dovetail.platforms.cpu.reference_attention import ReferenceAttention
from dovetail.runner import kv_memory
from dovetail.testing import engine_config

FULL = (KVGroup(layers=(0, 1)),)
MIXED = (KVGroup(layers=(0, 2)), KVGroup(layers=(1, 3), window=8))


def spec(kv_heads=2):
    return AttentionSpec(num_heads=4, num_kv_heads=kv_heads, head_size=16, scale=0.25)


def backend():
    device = torch.device("cpu")
    return ReferenceAttention(ops=OpTable(), device=device, dtype=torch.float32, kv_dtype=torch.float32, block_size=4)


def test_a_block_is_as_large_as_its_group_has_layers():
    page = 2 * 4 * 2 * 16 * 4
    assert kv_memory.block_bytes([spec(), spec()], FULL, backend()) == 2 * page
    with pytest.raises(ConfigError, match=r"KV pages of \[512, 1024\] bytes; they must be equal"):
        kv_memory.block_bytes([spec(1), spec(2)], FULL, backend())


def free(available, **kinds):
    return MemoryInfo(total=2 * available, available=available, **kinds)


def test_the_default_takes_most_of_dedicated_memory():
    config = engine_config(max_model_len=64, max_num_seqs=8)
    assert kv_memory.num_blocks(config, 100, FULL, free(10_000)) == 25
    assert kv_memory.num_blocks(config, 100, FULL, free(10_000, dedicated=True)) == 90


def test_the_default_holds_full_contexts_within_a_quarter():
    config = engine_config(max_model_len=64, max_num_seqs=3)  # 16 blocks of 4 each
    assert kv_memory.num_blocks(config, 100, FULL, free(10**9)) == 3 * 16 + 1
    assert kv_memory.num_blocks(config, 100, MIXED, free(10**9)) == 2 * 3 * 16 + 1  # a step may fill 64 tokens
    assert kv_memory.num_blocks(config, 100, FULL, free(4 * 2000)) == 20


def test_a_window_reserves_what_it_shows_and_a_step_adds():
    config = engine_config(max_model_len=64, max_num_seqs=3, max_num_batched_tokens=10)
    # 7 + 10 tokens, across page borders
    assert kv_memory.num_blocks(config, 100, MIXED, free(10**9)) == 3 * (16 + 6) + 1
    config = engine_config(max_model_len=64, max_num_batched_tokens=10, kv_cache_memory=2300)
    assert kv_memory.num_blocks(config, 100, MIXED, free(10**9)) == 23
    with pytest.raises(ConfigError, match="One request of --max-model-len 64"):
        kv_memory.num_blocks(engine_config(max_model_len=64, kv_cache_memory=2300), 100, MIXED, free(10**9))


def test_asked_memory_is_taken_as_asked_or_refused():
    config = engine_config(max_model_len=64, kv_cache_memory=5000)
    assert kv_memory.num_blocks(config, 100, FULL, free(10**6)) == 50
    with pytest.raises(ConfigError, match=r"--kv-cache-memory asks for .* are free on the device"):
        kv_memory.num_blocks(config, 100, FULL, free(4999))
    with pytest.raises(ConfigError) as caught:
        kv_memory.num_blocks(config, 1000, FULL, free(10**6))
    assert str(caught.value) == (
        "One request of --max-model-len 64 needs 16.6 KiB of KV cache, and the cache has 4.9 KiB, so 11.7 KiB are "
        "missing. Set --kv-cache-memory to 0.001 or lower --max-model-len."
    )


def test_groups_share_storage_layer_by_layer():
    caches = kv_memory.allocate([spec()] * 4, MIXED, backend(), blocks=5)
    assert caches[0] is caches[1]
    assert caches[2] is caches[3]
    assert caches[0] is not caches[2]
